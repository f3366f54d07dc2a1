"""The operators of attention over a cache in ONNX Runtime, from their templates."""

from collections.abc import Callable, Sequence

import onnx_ir as ir
import pytest
import torch
from torch import nn

from modcompile.export.compose_graph import opset_imports
from modcompile.export.templates import export_templates
from modcompile.export.translate_modules import Example, specimen
from modcompile.passes.gather_tokens import gather_tokens
from modcompile.passes.group_query_attention import group_query_attention
from tests.export.onnx_text import run

_HEADS, _KV_HEADS, _SIZE, _POSITIONS = 4, 2, 16, 20
Tensors = tuple[torch.Tensor, ...]


class _Attend(nn.Module):
    def __init__(self, *, rotary: bool, packed: bool, window: int) -> None:
        super().__init__()
        self.rotary, self.packed, self.window = rotary, packed, window

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        past_key: torch.Tensor,
        past_value: torch.Tensor,
        seqlens_k: torch.Tensor,
        total: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
    ) -> Tensors:
        cache, tables = (past_key, past_value, seqlens_k, total), (cos, sin) if self.rotary else (None, None)
        new = (torch.cat([q, k, v], -1), None, None) if self.packed else (q, k, v)
        outputs: Tensors = group_query_attention(*new, *cache, *tables, _HEADS, _KV_HEADS, 0.3, self.window)
        return outputs


class _Gather(nn.Module):
    def forward(self, x: torch.Tensor, index: torch.Tensor) -> Tensors:
        return (gather_tokens(x, index),)


def _inputs(batch: int, tokens: int, past: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(batch)
    sizes: list[tuple[int, ...]] = [(batch, tokens, heads * _SIZE) for heads in (_HEADS, _KV_HEADS, _KV_HEADS)]
    sizes += [(batch, _KV_HEADS, past, _SIZE)] * 2
    tables = (torch.randn(_POSITIONS, _SIZE // 2, generator=torch.Generator().manual_seed(0)) for _ in range(2))
    lengths = torch.full((batch,), past + tokens - 1, dtype=torch.int32)
    total = torch.tensor(past + tokens, dtype=torch.int32)
    return [*(torch.randn(size, generator=generator) for size in sizes), lengths, total, *tables]


def _exported(module: nn.Module, examples: Sequence[Example]) -> Callable[[Sequence[torch.Tensor]], Tensors]:
    """Calls a model of one call of the template."""
    item = specimen("template", module, examples)
    (template,) = export_templates([item])
    names = [str(value.name) for value in template.function.inputs[: len(examples)]]
    values = [ir.Value(name=name) for name in names]
    for value, (first, second) in zip(values, examples, strict=True):
        value.type = ir.TensorType(ir.tensor_adapters.from_torch_dtype(first.dtype))
        value.shape = ir.Shape(
            [one if one == other else None for one, other in zip(first.shape, second.shape, strict=True)]
        )
    constants = [ir.Value(name=each.name, type=each.type, const_value=each.const_value) for each in template.constants]
    outputs = [ir.Value(name=f"y_{index}") for index in range(len(item.outputs))]
    for output, (example, _) in zip(outputs, item.outputs, strict=True):
        output.type = ir.TensorType(ir.tensor_adapters.from_torch_dtype(example.dtype))
        output.shape = ir.Shape([None] * example.dim())
    call = ir.Node("modcompile", "template", [*values, *constants], outputs=outputs)
    imports = opset_imports()
    graph = ir.Graph(values, outputs, nodes=[call], initializers=constants, opset_imports=imports, name="calling")
    model = ir.Model(graph, ir_version=11, functions=[template.function])

    def called(inputs: Sequence[torch.Tensor]) -> Tensors:
        feeds = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
        return tuple(map(torch.from_numpy, run(model, feeds).values()))

    return called


@pytest.mark.parametrize(
    ("rotary", "packed", "window"),
    [(True, False, -1), (True, True, 3), (False, False, 1), (False, True, -1)],
)
@torch.no_grad()
def test_attention_is_one_operator_that_computes_the_same(rotary: bool, packed: bool, window: int) -> None:
    module = _Attend(rotary=rotary, packed=packed, window=window)
    pairs = list(zip(_inputs(2, 3, 5), _inputs(3, 5, 7), strict=True))
    called = _exported(module, pairs)
    for inputs in (_inputs(2, 1, 6), _inputs(1, 4, 0), _inputs(1, 3, 5)):
        torch.testing.assert_close(called(inputs), module(*inputs), rtol=0, atol=1e-5)


@torch.no_grad()
def test_gathers_tokens_of_each_row() -> None:
    x, index = torch.arange(24.0).view(2, 4, 3), torch.tensor([[3, 0], [1, 1]])
    called = _exported(_Gather(), [(x, torch.zeros(3, 5, 3)), (index, torch.zeros(3, 4, dtype=torch.long))])
    torch.testing.assert_close(called([x, index]), _Gather()(x, index), rtol=0, atol=0)
    other = torch.arange(9.0).view(1, 3, 3), torch.tensor([[2, 1, 0, 0]])
    torch.testing.assert_close(called(other), _Gather()(*other), rtol=0, atol=0)
