import logging
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes
import pytest
import torch
from onnx_ir import tensor_adapters
from torch import nn

from modcompile.export.templates import DOMAIN, Template, export_templates
from modcompile.export.translate_modules import OPSET, Example, specimen
from modcompile.passes.extract_subgraph import get_attribute
from tests.export.onnx_text import operators, run

TOKENS: Example = (torch.randn(2, 3, 8), torch.randn(3, 5, 8))


class Heads(nn.Module):
    """What in a decoder is apt to be folded: shapes, any(), and arithmetic on parameters alone."""

    def __init__(self, seed: int, scale: float) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.norm = nn.LayerNorm(8)
        self.up = nn.Linear(8, 8)
        self.twin = nn.Linear(8, 8, bias=False)
        self.scale = nn.Parameter(torch.full((1,), scale))
        self.unused = nn.Parameter(torch.randn(3))
        self.register_buffer("offset", torch.full((8,), float(seed)), persistent=False)
        self.up.bias.data.fill_(scale)
        self.twin.weight.data.copy_(self.up.weight.data)

    def forward(self, hidden: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, ...]:
        mixed = self.norm(hidden) @ (2 * self.twin.weight.T) + self.offset
        heads = (self.up(mixed) * self.scale).view(hidden.shape[0], hidden.shape[1], 2, 4).transpose(1, 2)
        return heads + torch.arange(4.0), torch.any(hidden > other), other[:, -1:]


HEADS = specimen("heads", Heads(seed=0, scale=0.0), [TOKENS, TOKENS])
STATE = {"norm.weight", "norm.bias", "up.weight", "up.bias", "twin.weight", "scale", "offset"}


@pytest.fixture(scope="module")
def template() -> Template:
    """Of a module whose parameters are as tempting as can be: zeros, ones and equal tensors."""
    (made,) = export_templates([HEADS])
    return made


def call(template: Template, module: nn.Module, inputs: Sequence[torch.Tensor]) -> list[np.ndarray]:
    """Run the template on the parameters of a module."""
    outputs = module(*inputs)
    feeds = {f"input_{index}": tensor.numpy() for index, tensor in enumerate(inputs)}
    values = [
        ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([None] * array.ndim))
        for name, array in feeds.items()
    ]
    tensors = [tensor_adapters.TorchTensor(get_attribute(module, name).detach(), name) for name in template.state]
    weights = [ir.Value(name=tensor.name, const_value=tensor) for tensor in tensors]
    constants = [ir.Value(name=f"constant.{v.name}", const_value=v.const_value) for v in template.constants]
    node = ir.Node(DOMAIN, template.function.name, [*values, *weights, *constants], num_outputs=len(outputs))
    for index, (value, example) in enumerate(zip(node.outputs, outputs, strict=True)):
        value.name, value.shape = f"output_{index}", ir.Shape([None] * example.dim())
        value.type = ir.TensorType(tensor_adapters.from_torch_dtype(example.dtype))
    graph = ir.Graph(
        values,
        node.outputs,
        nodes=[node],
        initializers=[*weights, *constants],
        opset_imports={"": OPSET, DOMAIN: 1},
        name="call",
    )
    model = ir.Model(graph, ir_version=10, functions=[template.function.clone()])
    common_passes.InlinePass()(model)
    return list(run(model, feeds).values())


@pytest.mark.parametrize("sizes", [(2, 3), (1, 1), (4, 9)])
@pytest.mark.parametrize(("seed", "scale"), [(0, 0.0), (1, 1.0), (2, 0.7)])
@torch.no_grad()
def test_every_module_of_the_code_gets_its_own_weights(
    template: Template, seed: int, scale: float, sizes: tuple[int, int]
) -> None:
    module, inputs = Heads(seed, scale), [torch.randn(*sizes, 8) for _ in range(2)]
    for actual, expected in zip(call(template, module, inputs), module(*inputs), strict=True):
        assert actual.shape == expected.shape
        torch.testing.assert_close(torch.from_numpy(np.asarray(actual)), expected, rtol=0, atol=1e-5)


def test_takes_inputs_then_state_then_constants(template: Template) -> None:
    names = [value.name for value in template.function.inputs]
    assert set(template.state) == STATE
    state = [f"state.{name}" for name in template.state]
    assert names[2:] == [*state, *(value.name for value in template.constants)]
    assert all(value.const_value is not None for value in template.constants)
    assert not template.function.graph.initializers


def test_computes_no_shapes_and_reduces_booleans_as_booleans(template: Template) -> None:
    found = operators(template.function.graph)
    assert not {"Shape", "Cast", "Concat", "Constant"} & set(found)
    assert found.count("ReduceMax") == 1
    assert found.count("Reshape") == 1


def test_dimensions_that_never_differ_are_fixed(template: Template) -> None:
    shape = template.function.inputs[0].shape
    assert shape is not None
    assert [isinstance(dim, int) for dim in shape] == [False, False, True]


class Sum(nn.Module):
    def forward(self, first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor]:
        return (first + second,)


def test_one_example_may_stand_for_two_inputs_and_nothing_is_said(caplog: pytest.LogCaptureFixture) -> None:
    """Warnings are errors in these tests."""
    with caplog.at_level(logging.WARNING):
        (template,) = export_templates([specimen("sum", Sum(), [TOKENS, TOKENS])])
    assert not caplog.records
    first, second = torch.randn(1, 2, 8), torch.randn(1, 2, 8)
    (total,) = call(template, Sum(), [first, second])
    np.testing.assert_array_equal(total, (first + second).numpy())
