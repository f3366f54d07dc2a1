import pytest
import torch
from torch import fx, nn
from transformers import PreTrainedModel

from modcompile.errors import UnsupportedModelError
from modcompile.passes import outline_blocks
from modcompile.passes.outline_blocks import find_block_nodes
from modcompile.passes.outlined_form import block_calls
from modcompile.tracing import find_layers
from tests.model_inputs import Padding, make_inputs
from tests.passes.toy_stacks import SIZE, Stack, trace
from tests.tiny_graphs import flat_graph, outlined_graph


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize(("batch", "length", "past_length"), [(1, 1, 0), (1, 7, 0), (2, 1, 5), (3, 4, 9)])
def test_keeps_every_output(
    model: PreTrainedModel,
    flat: fx.GraphModule,
    outlined: fx.GraphModule,
    batch: int,
    length: int,
    past_length: int,
    padding: Padding,
) -> None:
    inputs = make_inputs(model, batch, length, past_length, padding)
    with torch.no_grad():
        torch.testing.assert_close(outlined(*inputs.flat), flat(*inputs.flat), rtol=0, atol=0)


def test_keeps_every_output_without_cache(architecture: str, model: PreTrainedModel) -> None:
    inputs = make_inputs(model, 2, 5, 0, "left")
    flat, outlined = (make(architecture, use_cache=False) for make in (flat_graph, outlined_graph))
    with torch.no_grad():
        torch.testing.assert_close(outlined(*inputs.tokens), flat(*inputs.tokens), rtol=0, atol=0)


def test_calls_prologue_blocks_epilogue(model: PreTrainedModel, outlined: fx.GraphModule) -> None:
    called = [node.target for node in outlined.graph.find_nodes(op="call_module")]
    blocks = [f"blocks.{index}" for index in range(model.config.num_hidden_layers)]
    assert called == ["prologue", *blocks, "epilogue"]


def test_every_block_holds_its_layer_under_its_own_names(model: PreTrainedModel, outlined: fx.GraphModule) -> None:
    for index, layer in enumerate(find_layers(model)):
        block = outlined.get_submodule(f"blocks.{index}")
        held = dict(block.named_parameters())
        own = dict(layer.named_parameters())
        assert held.keys() == own.keys()
        assert all(held[name] is own[name] for name in own)


def test_blocks_take_hidden_state_then_shared_values_then_their_cache(outlined: fx.GraphModule) -> None:
    calls = block_calls(outlined.graph)
    pasts = outlined.graph.find_nodes(op="placeholder")[3:]
    for index, call in enumerate(calls):
        own = pasts[2 * index : 2 * index + 2]
        assert list(call.args[-2:]) == own
        assert call.args[1:-2] == calls[0].args[1:-2]
    for call, previous in zip(calls[1:], calls, strict=False):
        assert isinstance(call.args[0], fx.Node)
        assert call.args[0].args == (previous, 0)


def test_blocks_keep_the_meta_of_what_they_replace(outlined: fx.GraphModule) -> None:
    for call in block_calls(outlined.graph):
        assert all("val" in user.meta for user in call.users)


def test_takes_the_outermost_list_of_modules() -> None:
    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(SIZE, SIZE) for _ in range(3))

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return hidden + torch.stack([expert(hidden) for expert in self.experts]).sum(0)

    stack = Stack(Mixture(), Mixture())
    assert [prefix for prefix, _ in find_block_nodes(trace(stack))] == ["blocks.0.", "blocks.1."]


def test_refuses_a_model_without_repeated_block() -> None:
    with pytest.raises(UnsupportedModelError, match=r"^the model has no repeated decoder block"):
        outline_blocks(trace(Stack(nn.Linear(SIZE, SIZE))))


def test_refuses_blocks_that_hand_on_two_values() -> None:
    class TwoStreams(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE)

        def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.left(hidden), self.right(hidden)

    class Merging(Stack):
        def run_blocks(self, hidden: torch.Tensor, _mask: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                left, right = block(hidden)
                hidden = left + right
            return hidden

    with pytest.raises(UnsupportedModelError, match=r"^blocks\.0 hands on 2 values"):
        outline_blocks(trace(Merging(TwoStreams(), TwoStreams())))


def test_refuses_blocks_side_by_side() -> None:
    class Parallel(Stack):
        def run_blocks(self, hidden: torch.Tensor, _mask: torch.Tensor) -> torch.Tensor:
            return torch.stack([block(hidden) for block in self.blocks]).sum(0)

    with pytest.raises(UnsupportedModelError, match=r"^blocks\.1 does not take the hidden state"):
        outline_blocks(trace(Parallel(nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE))))


def test_refuses_work_between_two_blocks() -> None:
    class Residual(Stack):
        def run_blocks(self, hidden: torch.Tensor, _mask: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                hidden = hidden + block(hidden)
            return hidden

    with pytest.raises(UnsupportedModelError, match=r"^blocks\.1 does not take the hidden state"):
        outline_blocks(trace(Residual(nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE))))


def test_refuses_a_second_value_made_between_two_blocks() -> None:
    class Fed(Stack):
        def run_blocks(self, hidden: torch.Tensor, _mask: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                hidden = block(hidden, hidden.sin())
            return hidden

    with pytest.raises(UnsupportedModelError, match=r"^sin\w* lies between two decoder blocks"):
        outline_blocks(trace(Fed(nn.Bilinear(SIZE, SIZE, SIZE), nn.Bilinear(SIZE, SIZE, SIZE))))
