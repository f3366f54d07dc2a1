import torch

from modcompile.passes.masked_block import masked_block
from tests.passes.toy_block import HIDDEN, PAST_KEY, toy_block


@torch.no_grad()
def test_changes_the_open_tokens_only_and_has_the_keys_of_all() -> None:
    block = toy_block()
    executed, key = block(HIDDEN, PAST_KEY)
    is_open = HIDDEN[..., :1] > 0
    hidden, own_key = masked_block(block)(HIDDEN, PAST_KEY, is_open)
    opened = is_open.squeeze(-1)
    assert 0 < int(opened.sum()) < opened.numel()
    assert torch.equal(hidden[opened], executed[opened])
    assert torch.equal(hidden[~opened], HIDDEN[~opened])
    assert torch.equal(own_key, key)
