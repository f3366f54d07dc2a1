import pytest
import torch
from torch import fx

from modcompile.passes import fuse_operators
from modcompile.passes.carry_norms import carry_norms
from modcompile.passes.outlined_form import block_calls, layers_called, num_outputs
from tests.model_inputs import make_inputs
from tests.passes.traced import calls
from tests.wide_models import wide_lowered, wide_model, wide_outlined


def _norms(gm: fx.GraphModule) -> list[int]:
    blocks = [gm.get_submodule(str(call.target)) for call in block_calls(gm.graph)]
    return [calls(block)["rms_norm"] for block in blocks if isinstance(block, fx.GraphModule)]


@pytest.mark.parametrize("past_length", [0, 4])
@torch.no_grad()
def test_keeps_every_output(past_length: int) -> None:
    gm = fuse_operators(wide_outlined("llama"))
    inputs = make_inputs(wide_model("llama"), 2, 3, past_length, "left")
    torch.testing.assert_close(carry_norms(gm)(*inputs.flat), gm(*inputs.flat), rtol=0, atol=0)


def test_a_block_ends_with_the_first_norm_of_the_next() -> None:
    gm = fuse_operators(wide_outlined("llama"))
    carried = carry_norms(gm)
    assert _norms(gm) == [2, 2, 2]
    assert _norms(carried) == [3, 2, 1]
    first, *_, last = (gm.get_submodule(str(call.target)) for call in block_calls(gm.graph))
    first_after, *_, last_after = (carried.get_submodule(str(call.target)) for call in block_calls(carried.graph))
    assert isinstance(first, fx.GraphModule)
    assert isinstance(first_after, fx.GraphModule)
    assert num_outputs(first_after) == num_outputs(first) + 1
    assert {id(each) for each in carried.parameters()} == {id(each) for each in gm.parameters()}
    assert last is not last_after


@torch.no_grad()
def test_only_between_blocks_that_are_always_executed() -> None:
    """The gate is that of the last block: what comes before it hands nothing on to it."""
    gm = fuse_operators(wide_lowered("llama", (range(2, 3),)))
    carried = carry_norms(gm)
    assert [layers_called(call).start for call in block_calls(carried.graph)] == [0, 1, 2]
    assert _norms(carried)[:2] == [3, 1]
    inputs = make_inputs(wide_model("llama"), 2, 3, 2)
    torch.testing.assert_close(carried(*inputs.flat), gm(*inputs.flat), rtol=0, atol=0)


@torch.no_grad()
def test_leaves_norms_that_it_does_not_know() -> None:
    gm = fuse_operators(wide_outlined("gpt2"))
    assert _norms(gm) == _norms(carry_norms(gm))
    inputs = make_inputs(wide_model("gpt2"), 2, 3, 2)
    torch.testing.assert_close(carry_norms(gm)(*inputs.flat), gm(*inputs.flat), rtol=0, atol=0)
