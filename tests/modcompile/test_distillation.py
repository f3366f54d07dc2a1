import math

import pytest
import torch

from modcompile.distillation import dense_logits, divergences
from tests.tiny_routed import tiny_base

IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 0, 0]])
MASK = (IDS != 0).long()


def _random(seed: int) -> torch.Tensor:
    return torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(seed))


def test_padding_changes_nothing_for_the_other_tokens() -> None:
    base = tiny_base()
    logits = dense_logits(base, IDS, MASK)
    assert not logits.requires_grad
    for row, count in zip(range(2), MASK.sum(1).tolist(), strict=True):
        alone = base(IDS[row : row + 1, :count]).logits
        torch.testing.assert_close(logits[row, :count], alone[0])
    left = dense_logits(base, IDS[1:].roll(2, 1), MASK[1:].roll(2, 1))
    torch.testing.assert_close(left[0, 2:], logits[1, :4])


def test_is_the_divergence_of_the_predicted_tokens() -> None:
    """Row by row, computed here from probabilities one by one."""
    ours, theirs = _random(0), _random(1)
    is_predicted = MASK[:, 1:] != 0
    expected = []
    for row, column in is_predicted.nonzero().tolist():
        p, q = (each[row, column].softmax(-1).tolist() for each in (theirs, ours))
        expected.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
    assert divergences(ours, theirs, is_predicted).tolist() == pytest.approx(expected, rel=1e-5)


def test_is_zero_for_equal_predictions_and_pulls_towards_them() -> None:
    theirs, is_predicted = _random(1), MASK[:, 1:] != 0
    assert float(divergences(theirs + 3.0, theirs, is_predicted).sum()) == pytest.approx(0, abs=1e-5)
    ours = _random(0).requires_grad_()
    divergence = divergences(ours, theirs, is_predicted).sum()
    divergence.backward()
    assert ours.grad is not None
    assert not ours.grad[:, -1].any()
    closer = divergences(ours.detach() - 0.1 * ours.grad, theirs, is_predicted).sum()
    assert 0 < float(closer) < float(divergence.detach())
