import math

import pytest
import torch

from modcompile.precision_usage import PrecisionUsage, mean_bits

# Two blocks, two rows of three tokens, the first token of the second row is padding.
_TOKENS = torch.tensor([[1, 1, 1], [0, 1, 1]]).bool()
_BITS = (torch.tensor([[4, 4, 4], [8, 8, 0]]), torch.tensor([[16, 16, 16], [2, 16, 16]]))


def test_shares_are_of_tokens_that_are_not_padding() -> None:
    usage = PrecisionUsage()
    usage.update(_BITS, _TOKENS)
    assert usage.shares == ({0: 1 / 5, 4: 3 / 5, 8: 1 / 5}, {16: 1.0})
    assert [list(by_bits) for by_bits in usage.shares] == [[0, 4, 8], [16]]
    assert usage.average_bits == pytest.approx((20 / 5 + 16) / 2)


def test_adds_calls_weighted_by_their_tokens() -> None:
    usage = PrecisionUsage()
    usage.update((torch.tensor([[16]]),), torch.ones(1, 1).bool())
    usage.update((torch.full((3, 3), 4),), torch.ones(3, 3, dtype=torch.int64))
    assert usage.shares == ({4: 0.9, 16: 0.1},)
    assert usage.average_bits == pytest.approx(0.9 * 4 + 0.1 * 16)


def test_is_not_a_number_before_the_first_call() -> None:
    assert PrecisionUsage().shares == ()
    assert math.isnan(PrecisionUsage().average_bits)


def test_mean_counts_skipped_tokens_as_no_bits() -> None:
    assert mean_bits({0: 0.25, 4: 0.25, 16: 0.5}) == 9.0
