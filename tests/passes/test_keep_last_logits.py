import pytest
import torch

from modcompile.passes.keep_last_logits import LOGITS_TO_KEEP, keep_last_logits, last_tokens
from tests.model_inputs import make_inputs
from tests.passes.traced import random
from tests.tiny_graphs import outlined_graph, shared_model


@pytest.mark.parametrize(("count", "kept"), [(0, 0), (1, 1), (3, 3), (5, 5), (9, 5)])
def test_takes_the_last_tokens(count: int, kept: int) -> None:
    x = random(2, 5, 3)
    expected = x[:, 5 - kept :]
    torch.testing.assert_close(last_tokens(x, torch.tensor([count])), expected, rtol=0, atol=0)


@torch.no_grad()
def test_a_graph_returns_all_logits_until_told_otherwise() -> None:
    dense = outlined_graph("llama")
    gm = keep_last_logits(dense)
    inputs = make_inputs(shared_model("llama"), 2, 4, 3)
    expected = dense(*inputs.flat)
    torch.testing.assert_close(gm(*inputs.flat), expected, rtol=0, atol=0)
    gm.get_buffer(LOGITS_TO_KEEP).fill_(2)
    logits, *cache = gm(*inputs.flat)
    assert logits.shape[1] == 2
    # A product of fewer rows may round in another way.
    torch.testing.assert_close(logits, expected[0][:, -2:], rtol=0, atol=1e-5)
    torch.testing.assert_close(cache, list(expected[1:]), rtol=0, atol=0)


def test_shares_parameters_and_leaves_its_argument_alone() -> None:
    dense = outlined_graph("llama")
    before = dense.code
    assert {id(each) for each in keep_last_logits(dense).parameters()} == {id(each) for each in dense.parameters()}
    assert dense.code == before
