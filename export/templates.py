"""One ONNX function for all modules that run the same code.

Blocks of one model differ in their parameters only. So a module is exported once, by `torch.onnx`, as a function whose
parameters are inputs, and called as often as it occurs:

    linear(x, self.w)   →   template(x, w):  MatMul(x, Transpose(w))

Export time then hardly grows with the depth of the model.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import onnx_ir.passes.common as common_passes
import onnxscript.optimizer
import torch
from torch import nn

from modcompile.export import attention_translation, norm_translation, open_tokens_translation, quantized_translation
from modcompile.export.fold_any import FoldAny
from modcompile.export.fold_shapes import FoldShapes
from modcompile.export.quiet_exporter import quiet_exporter
from modcompile.passes.extract_subgraph import get_attribute

DOMAIN = "modcompile"
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
class Template:
    """An ONNX function, and what it takes and returns.

    Its inputs are those of the module, then `state` (names of parameters and buffers), then `constants`.
    """

    function: ir.Function
    state: tuple[str, ...]
    constants: tuple[ir.Value, ...]
    outputs: tuple[Example, ...]


def export_template(module: nn.Module, examples: Sequence[Example], name: str) -> Template:
    """Export `module` as a function called `name`; every dimension that differs between two examples stays free."""
    first, second = zip(*examples, strict=True)
    with torch.no_grad():
        outputs = tuple(zip(module(*first), module(*second), strict=True))
        shapes = tuple(_dynamic_shape(*example) for example in examples)
        # Each input an object of its own: export merges the inputs that are one object.
        ep = torch.export.export(module, tuple(tensor.clone() for tensor in first), dynamic_shapes=shapes, strict=False)
    with quiet_exporter():
        program = torch.onnx.export(
            ep,
            dynamo=True,
            verbose=False,
            optimize=False,
            opset_version=OPSET,
            custom_translation_table=dict(_TRANSLATIONS),
        )
        assert program is not None
        graph = program.model.graph
        state = [value for key, value in graph.initializers.items() if _has_attribute(module, key)]
        for value in state:
            # Inputs before anything is optimized: what is folded into a constant would be one layer's own.
            del graph.initializers[str(value.name)]
            value.const_value = None
        graph.inputs.extend(state)
        onnxscript.optimizer.optimize(program.model)
        # Not before: the optimizer reads the 0 of a relative shape as a size.
        ir.passes.Sequential(FoldShapes(), FoldAny(), common_passes.RemoveUnusedNodesPass())(program.model)
    constants = tuple(_lift_constants(graph))
    function = ir.Function(DOMAIN, name, graph=graph, attributes=())
    return Template(function, tuple(str(value.name) for value in state), constants, outputs)


def _lift_constants(graph: ir.Graph) -> Iterator[ir.Value]:
    """Make the initializers inputs, too (a function has none), and yield what they held."""
    for name, value in list(graph.initializers.items()):
        yield ir.Value(name=name, type=value.type, shape=value.shape, const_value=value.const_value)
        del graph.initializers[name]
        value.const_value = None
        graph.inputs.append(value)


def _dynamic_shape(first: torch.Tensor, second: torch.Tensor) -> dict[int, Any]:
    sizes = enumerate(zip(first.shape, second.shape, strict=True))
    return {dim: torch.export.Dim.AUTO for dim, (one, other) in sizes if one != other}


def _has_attribute(module: nn.Module, name: str) -> bool:
    try:
        return isinstance(get_attribute(module, name), torch.Tensor)
    except AttributeError:
        return False
