import math

import pytest
import torch

from modcompile.usage import RoutingUsage, active_tokens

# Two layers, two rows of three tokens, the first token of the second row is padding.
_TOKENS = torch.tensor([[1, 1, 1], [0, 1, 1]]).bool()
_MASKS = (
    torch.tensor([[1, 0, 0], [1, 1, 0]]).bool().unsqueeze(-1),
    torch.tensor([[1, 1, 1], [1, 1, 1]]).bool().unsqueeze(-1),
)


def test_counts_tokens_that_are_not_padding() -> None:
    assert active_tokens(_MASKS, _TOKENS).tolist() == [2, 5]


def test_sums_soft_gates_and_passes_their_gradient_on_except_for_padding() -> None:
    gate = torch.full((2, 3, 1), 0.25, requires_grad=True)
    active = active_tokens((gate,), _TOKENS)
    assert active.tolist() == [1.25]
    active.sum().backward()
    assert gate.grad is not None
    assert torch.equal(gate.grad.squeeze(-1), _TOKENS.float())


def test_sums_in_float32_whatever_the_gates_are() -> None:
    # bfloat16 has no number between 256 and 258.
    gates = (torch.ones(1, 257, 1, dtype=torch.bfloat16),)
    assert active_tokens(gates, torch.ones(1, 257)).tolist() == [257]


def test_ratio_of_all_layers_and_of_each() -> None:
    usage = RoutingUsage((3, 7))
    usage.update(_MASKS, _TOKENS)
    assert usage.tokens == 5
    assert usage.active_ratio_per_layer == {3: 2 / 5, 7: 1.0}
    assert usage.active_ratio == pytest.approx(0.7)


def test_adds_calls_weighted_by_their_tokens() -> None:
    usage = RoutingUsage((0,))
    usage.update((torch.ones(1, 1, 1).bool(),), torch.ones(1, 1).bool())
    usage.update((torch.zeros(3, 3, 1).bool(),), torch.ones(3, 3).bool())
    assert usage.active_ratio == 0.1


def test_is_not_a_number_before_the_first_call() -> None:
    usage = RoutingUsage((0, 1))
    assert math.isnan(usage.active_ratio)
    assert usage.active_ratio_per_layer == {}
