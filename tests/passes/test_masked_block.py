import pytest
import torch
from torch import nn

from modcompile.passes.masked_block import masked_block
from tests.passes.toy_block import HIDDEN, PAST_KEY, toy_block


@pytest.mark.parametrize("skip", [None, nn.Linear(8, 8)])
@torch.no_grad()
def test_executes_the_open_tokens_only_and_has_the_keys_of_all(skip: nn.Module | None) -> None:
    block = toy_block()
    executed, key = block(HIDDEN, PAST_KEY)
    is_open = HIDDEN[..., :1] > 0
    hidden, own_key = masked_block(block, skip)(HIDDEN, PAST_KEY, is_open)
    opened = is_open.squeeze(-1)
    assert 0 < int(opened.sum()) < opened.numel()
    assert torch.equal(hidden[opened], executed[opened])
    skipped = HIDDEN if skip is None else skip(HIDDEN)
    assert torch.equal(hidden[~opened], skipped[~opened])
    assert torch.equal(own_key, key)
