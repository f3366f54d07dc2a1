import pytest
import torch
from torch import nn

from modcompile.errors import UnsupportedModelError
from modcompile.passes.skip_block import skip_block
from tests.passes.toy_block import HIDDEN, PAST_KEY, toy_block
from tests.passes.traced import calls


@torch.no_grad()
def test_keeps_the_keys_and_does_nothing_else() -> None:
    block = toy_block()
    skipped = skip_block(block)
    hidden, key = skipped(HIDDEN, PAST_KEY)
    assert torch.equal(hidden, HIDDEN)
    assert hidden is not HIDDEN
    assert torch.equal(key, block(HIDDEN, PAST_KEY)[1])
    assert calls(skipped) == {"mul": 1, "unsqueeze": 1, "cat": 1}
    assert skipped.graph.find_nodes(op="placeholder")[0].name == block.graph.find_nodes(op="placeholder")[0].name


@torch.no_grad()
def test_a_token_goes_through_the_skip_path() -> None:
    block, skip = toy_block(), nn.Linear(8, 8)
    skipped = skip_block(block, skip)
    hidden, key = skipped(HIDDEN, PAST_KEY)
    assert torch.equal(hidden, skip(HIDDEN))
    assert torch.equal(key, block(HIDDEN, PAST_KEY)[1])
    assert calls(skipped) == {"mul": 1, "unsqueeze": 1, "cat": 1}


def test_refuses_a_block_that_writes_in_place() -> None:
    block = toy_block()
    (cat,) = block.graph.find_nodes(op="call_function", target=torch.ops.aten.cat.default)
    with block.graph.inserting_after(cat):
        block.graph.call_function(torch.ops.aten.mul_.Tensor, (cat, 2))
    block.recompile()
    with pytest.raises(UnsupportedModelError, match=r"^a decoder block writes to a tensor in place \(aten\.mul_"):
        skip_block(block)
