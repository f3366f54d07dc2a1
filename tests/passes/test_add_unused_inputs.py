import torch

from modcompile.passes.add_unused_inputs import add_unused_inputs
from tests.passes.toy_block import HIDDEN, PAST_KEY, toy_block


@torch.no_grad()
def test_takes_more_and_returns_the_same() -> None:
    block = toy_block()
    names = [node.name for node in block.graph.find_nodes(op="placeholder")]
    more = add_unused_inputs(block, ["first", "second"])
    assert [node.name for node in more.graph.find_nodes(op="placeholder")] == [*names, "first", "second"]
    actual = list(more(HIDDEN, PAST_KEY, torch.zeros(1), torch.ones(2)))
    torch.testing.assert_close(actual, list(block(HIDDEN, PAST_KEY)), rtol=0, atol=0)
    assert [node.name for node in block.graph.find_nodes(op="placeholder")] == names
