import pytest
import torch
from torch import nn

from modcompile.passes.mixed_block import mixed_block
from modcompile.passes.outlined_form import inner_block
from modcompile.passes.skip_path import skip_of
from tests.passes.toy_block import HIDDEN, PAST_KEY, toy_block


@pytest.mark.parametrize("value", [0.0, 0.25, 1.0])
@torch.no_grad()
def test_mixes_the_hidden_state_and_has_the_keys_of_the_block(value: float) -> None:
    block = toy_block()
    mixed = mixed_block(block)
    assert inner_block(mixed) is block
    executed, key = block(HIDDEN, PAST_KEY)
    gate = torch.full_like(HIDDEN[..., :1], value)
    hidden, own_key = mixed(HIDDEN, PAST_KEY, gate)
    assert torch.equal(hidden, value * executed + (1 - value) * HIDDEN)
    assert torch.equal(own_key, key)


@torch.no_grad()
def test_a_closed_gate_takes_the_skip_path() -> None:
    block, skip = toy_block(), nn.Linear(8, 8)
    mixed = mixed_block(block, skip)
    assert skip_of(mixed) is skip
    executed, key = block(HIDDEN, PAST_KEY)
    gate = torch.linspace(0, 1, HIDDEN[..., :1].numel()).view_as(HIDDEN[..., :1])
    hidden, own_key = mixed(HIDDEN, PAST_KEY, gate)
    assert torch.equal(hidden, gate * executed + (1 - gate) * skip(HIDDEN))
    assert torch.equal(own_key, key)
