"""Translate several modules to ONNX with one call of the exporter.

    linear(x, self.w)   →   translation(x, state.w):  MatMul(x, Transpose(state.w))

A call of `torch.onnx.export` reads all translations there are before it uses a few of them, which takes longer than
most modules do. So the modules are exported side by side, as one, and cut apart again.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import onnx_ir.passes.common as common_passes
import torch
from torch import nn

from modcompile.export import attention_translation, norm_translation, open_tokens_translation, quantized_translation
from modcompile.export.quiet_exporter import quiet_exporter
from modcompile.passes.extract_subgraph import get_attribute
from modcompile.stages import stage

OPSET = 23

_TRANSLATIONS = (
    attention_translation.TRANSLATIONS
    | norm_translation.TRANSLATIONS
    | open_tokens_translation.TRANSLATIONS
    | quantized_translation.TRANSLATIONS
)

Example = tuple[torch.Tensor, torch.Tensor]
"""One tensor at two sets of sizes: the dimensions in which they differ are dynamic."""


@dataclass(frozen=True)
class Specimen:
    """A module, `inputs → tuple(outputs)`, and what it takes and returns at two sets of sizes."""

    name: str
    module: nn.Module
    inputs: tuple[Example, ...]
    outputs: tuple[Example, ...]


@dataclass(frozen=True)
class Translation:
    """An ONNX graph without weights: its inputs are those of the module, then `state` (parameters and buffers)."""

    graph: ir.Graph
    state: tuple[str, ...]


def specimen(name: str, module: nn.Module, inputs: Sequence[Example]) -> Specimen:
    """Run `module` at both sizes to see what it returns."""
    first, second = zip(*inputs, strict=True)
    with torch.no_grad():
        return Specimen(name, module, tuple(inputs), tuple(zip(module(*first), module(*second), strict=True)))


def translate_modules(specimens: Sequence[Specimen]) -> list[Translation]:
    """A translation of each; every dimension that differs between its two examples stays free."""
    names = [_state_of(item.module) for item in specimens]
    # Each input an object of its own: export merges the inputs that are one object. Of weights nobody reads the values.
    inputs = tuple(tuple(first.clone() for first, _ in item.inputs) for item in specimens)
    states = tuple(
        tuple(torch.empty_like(get_attribute(item.module, name)) for name in own)
        for item, own in zip(specimens, names, strict=True)
    )
    shapes: tuple[Any, ...] = (
        tuple(tuple(_dynamic_shape(*example) for example in item.inputs) for item in specimens),
        tuple(tuple({} for _ in own) for own in names),
    )
    with stage("tracing templates"), torch.no_grad():
        together = _SideBySide([item.module for item in specimens], names)
        ep = torch.export.export(together, (inputs, states), dynamic_shapes=shapes, strict=False)
    with stage("translating templates"), quiet_exporter():
        program = torch.onnx.export(
            ep,
            dynamo=True,
            verbose=False,
            optimize=False,
            opset_version=OPSET,
            custom_translation_table=dict(_TRANSLATIONS),
        )
        assert program is not None
        common_passes.InlinePass()(program.model)
    taken, returned = iter(program.model.graph.inputs), iter(program.model.graph.outputs)
    arguments = [[next(taken) for _ in item.inputs] for item in specimens]
    translations = []
    for item, own, argument in zip(specimens, names, arguments, strict=True):
        weights = {name: next(taken) for name in own}
        used = {name: value for name, value in weights.items() if value.uses() or value.is_graph_output()}
        for name, value in used.items():
            value.name = f"state.{name}"
        outputs = [next(returned) for _ in item.outputs]
        graph = ir.convenience.extract(program.model.graph, [*argument, *used.values()], outputs)
        translations.append(Translation(graph, tuple(used)))
    return translations


class _SideBySide(nn.Module):
    """Runs modules, each on tensors of its own, with the parameters and buffers that it is given."""

    def __init__(self, modules: Sequence[nn.Module], names: Sequence[Sequence[str]]) -> None:
        super().__init__()
        # In a plain list: the weights are inputs, so that none that two modules share becomes one.
        self._calls = list(zip(modules, names, strict=True))

    def forward(
        self, inputs: Sequence[Sequence[torch.Tensor]], states: Sequence[Sequence[torch.Tensor]]
    ) -> tuple[Any, ...]:
        return tuple(
            torch.func.functional_call(module, dict(zip(names, state, strict=True)), tuple(args), tie_weights=False)
            for (module, names), args, state in zip(self._calls, inputs, states, strict=True)
        )


def _state_of(module: nn.Module) -> list[str]:
    parameters = [name for name, _ in module.named_parameters(remove_duplicate=False)]
    return parameters + [name for name, _ in module.named_buffers(remove_duplicate=False)]


def _dynamic_shape(first: torch.Tensor, second: torch.Tensor) -> dict[int, Any]:
    sizes = enumerate(zip(first.shape, second.shape, strict=True))
    return {dim: torch.export.Dim.AUTO for dim, (one, other) in sizes if one != other}
