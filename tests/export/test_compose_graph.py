from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes
import pytest
import torch
from onnx_ir.tensor_adapters import TorchTensor, from_torch_dtype
from torch import fx, nn

from modcompile.config import RouterConfig
from modcompile.export.compose_graph import Composer, Operand, opset_imports
from modcompile.passes import group_blocks, harden_gates, insert_depth_gates, lower_gates, outline_blocks
from modcompile.routers import DepthRouter, SoftGate
from tests.export.onnx_text import run
from tests.passes.toy_stacks import SIZE, Stack, trace

TOKEN_INPUTS = ("input_ids", "attention_mask", "position_ids")


class Block(nn.Module):
    def __init__(self, activation: Callable[[torch.Tensor], torch.Tensor] = torch.tanh) -> None:
        super().__init__()
        self.linear = nn.Linear(SIZE, SIZE)
        self.activation = activation

    def forward(self, hidden: torch.Tensor, shared: torch.Tensor) -> torch.Tensor:
        return hidden + self.activation(self.linear(hidden) + shared)


class SharingStack(Stack):
    """Like a decoder's, its blocks take a tensor that is the same for all; the embedding is tied to the head."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__(*blocks)
        self.head.weight = self.embed.weight

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        hidden, shared = self.embed(input_ids), (attention_mask * position_ids).unsqueeze(-1).float()
        for block in self.blocks:
            hidden = block(hidden, shared)
        return self.head(hidden), []


@dataclass
class Composed:
    gm: fx.GraphModule
    composer: Composer
    inputs: list[Operand]
    nodes: list[ir.Node]
    outputs: list[Operand]


def compose(*blocks: nn.Module, blocks_per_gate: int = 1) -> Composed:
    """A stack with routers on all blocks but the last, lowered and composed."""
    torch.manual_seed(0)
    routers = {}
    gates = RouterConfig(lock_last_layers=1, blocks_per_gate=blocks_per_gate).gated_layers(len(blocks))
    for layer in (layers.start for layers in gates):
        routers[layer] = DepthRouter(SIZE, 4, dropout=0.0, layer_norm=True, init_bias=0.0).eval()
        nn.init.normal_(routers[layer].score.down.weight, std=2.0)
    outlined = group_blocks(outline_blocks(trace(SharingStack(*blocks))), gates)
    gm = lower_gates(harden_gates(insert_depth_gates(outlined, routers, SoftGate())))
    inputs = []
    for name in TOKEN_INPUTS:
        value = ir.Value(name=name, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["batch", "sequence"]))
        inputs.append(Operand(value, (torch.ones(2, 3, dtype=torch.long), torch.ones(3, 5, dtype=torch.long))))
    composer = Composer()
    return Composed(gm, composer, inputs, *composer.compose(gm, inputs))


def calls(nodes: list[ir.Node]) -> dict[str, str]:
    """Which function every call runs, by the name of the call; those in branches included."""
    found: dict[str, str] = {}
    for node in nodes:
        if node.op_type == "If":
            for attribute in node.attributes.values():
                found |= calls(list(attribute.as_graph()))
        else:
            found[str(node.name)] = node.op_type
    return found


@pytest.fixture(scope="module")
def six_blocks() -> Composed:
    return compose(*(Block() for _ in range(6)))


def test_layers_of_one_code_call_the_same_functions_however_many_there_are(six_blocks: Composed) -> None:
    expected = {name: name for name in ("prologue", "routing_inputs", "epilogue")} | {"blocks.5": "blocks_5"}
    for layer in range(5):
        for part in ("decide", "then_branch", "else_branch"):
            expected[f"blocks.{layer}.{part}"] = f"blocks_0_{part}"
    assert calls(six_blocks.nodes) == expected
    assert six_blocks.composer.functions.keys() == set(expected.values())


def test_a_group_calls_the_functions_of_its_first_block_for_each() -> None:
    grouped = compose(*(Block() for _ in range(6)), blocks_per_gate=3)
    expected = {name: name for name in ("prologue", "routing_inputs", "epilogue")} | {"blocks.5": "blocks_5"}
    for name, members in (("0-2", 3), ("3-4", 2)):
        expected[f"blocks.{name}.decide"] = "blocks_0-2_decide"
        for part in ("then_branch", "else_branch"):
            expected |= {f"blocks.{name}.{part}.{index}": f"blocks_0-2_{part}_0" for index in range(members)}
    assert calls(grouped.nodes) == expected
    assert grouped.composer.functions.keys() == set(expected.values())


def test_every_routed_block_is_an_if_with_a_call_in_each_branch(six_blocks: Composed) -> None:
    conditionals = [node for node in six_blocks.nodes if node.op_type == "If"]
    assert [node.name for node in conditionals] == [f"blocks.{layer}.if" for layer in range(5)]
    for layer, node in enumerate(conditionals):
        assert list(node.attributes) == ["then_branch", "else_branch"]
        assert all(len(attribute.as_graph()) == 1 for attribute in node.attributes.values())
        (condition,) = node.inputs
        assert condition is not None
        assert condition.name == f"blocks.{layer}.decide.2"


def test_every_parameter_is_one_initializer_and_not_copied(six_blocks: Composed) -> None:
    tensors = [value.const_value for value in six_blocks.composer.initializers.values()]
    held = [tensor.raw.data_ptr() for tensor in tensors if isinstance(tensor, TorchTensor)]
    parameters = [*six_blocks.gm.parameters(), six_blocks.gm.get_buffer("routing_threshold")]
    assert [held.count(parameter.data_ptr()) for parameter in parameters] == [1] * len(parameters)


def test_tells_what_it_returns_at_both_sizes(six_blocks: Composed) -> None:
    logits, *masks = six_blocks.outputs
    assert [example.shape for example in logits.example] == [(2, 3, 16), (3, 5, 16)]
    assert [[example.shape for example in mask.example] for mask in masks] == [[(2, 3, 1), (3, 5, 1)]] * 5
    assert all(mask.example[0].dtype == torch.bool for mask in masks)


@torch.no_grad()
def test_every_layer_computes_with_its_own_code_and_weights() -> None:
    composed = compose(Block(torch.tanh), Block(torch.sin), Block(torch.tanh))
    functions = calls(composed.nodes)
    assert functions["blocks.0.then_branch"] != functions["blocks.1.then_branch"]
    assert functions["blocks.0.decide"] == functions["blocks.1.decide"]

    for index, operand in enumerate(composed.outputs):
        operand.value.name, operand.value.shape = f"output_{index}", ir.Shape([None] * 3)
        operand.value.dtype = from_torch_dtype(operand.example[0].dtype)
    graph = ir.Graph(
        [operand.value for operand in composed.inputs],
        [operand.value for operand in composed.outputs],
        nodes=composed.nodes,
        initializers=list(composed.composer.initializers.values()),
        opset_imports=opset_imports(),
        name="toy",
    )
    model = ir.Model(graph, ir_version=10, functions=list(composed.composer.functions.values()))
    common_passes.InlinePass()(model)
    ids = torch.randint(16, (3, 7), generator=torch.Generator().manual_seed(0))
    feeds = [ids, torch.ones_like(ids), torch.arange(7).expand(3, 7)]
    executed = set()
    for threshold in (0.0, 0.5, 2.0):
        composed.gm.get_buffer("routing_threshold").fill_(threshold)
        expected = composed.gm(*feeds)
        actual = run(model, {name: tensor.numpy() for name, tensor in zip(TOKEN_INPUTS, feeds, strict=True)})
        for array, tensor in zip(actual.values(), expected, strict=True):
            np.testing.assert_allclose(array, tensor.numpy(), rtol=0, atol=1e-5)
        executed.add(tuple(int(mask.sum()) for mask in expected[1:]))
    assert len(executed) == 3


def test_a_constant_belongs_to_no_module() -> None:
    composer = Composer()
    value = composer.constant("axis", torch.tensor([2]))
    assert composer.initializers == {"axis": value}
    assert value.const_value is not None
    assert value.const_value.numpy().tolist() == [2]
