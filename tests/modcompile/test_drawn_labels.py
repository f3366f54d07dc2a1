import pytest
import torch
from torch.nn.functional import cross_entropy

from modcompile.drawn_labels import label_gradient

VOCABULARY = 5
PREDICTING = torch.tensor([[1, 1, 0], [1, 0, 0]]) == 1


def _logits(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    torch.manual_seed(0)
    return (2 * torch.randn(2, 3, VOCABULARY)).to(dtype).requires_grad_()


def _labels(logits: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """`[N]`: the drawn ones, whose part of the gradient alone is negative."""
    assert int((gradient < 0).sum()) == int(PREDICTING.sum())
    return gradient.argmin(-1)[PREDICTING]


def test_is_the_gradient_of_the_loss_of_its_labels() -> None:
    logits = _logits()
    found = label_gradient(logits, PREDICTING)
    loss = cross_entropy(logits[PREDICTING], _labels(logits, found), reduction="sum")
    (expected,) = torch.autograd.grad(loss, logits)
    assert not found.requires_grad
    torch.testing.assert_close(found, expected)


def test_other_tokens_have_none() -> None:
    found = label_gradient(_logits(), PREDICTING)
    assert not found[~PREDICTING].any()
    assert found[PREDICTING].any(-1).all()
    assert not label_gradient(_logits(), torch.zeros_like(PREDICTING)).any()


def test_labels_are_as_frequent_as_predicted() -> None:
    logits, draws = _logits(), 4000
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(int(PREDICTING.sum()), VOCABULARY)
    for _ in range(draws):
        labels = _labels(logits, label_gradient(logits, PREDICTING, generator))
        counts[torch.arange(len(labels)), labels] += 1
    expected = logits.detach()[PREDICTING].softmax(-1)
    # Four standard deviations of a binomial share are sqrt(4 / 4000) at most.
    torch.testing.assert_close(counts / draws, expected, rtol=0, atol=0.032)


def test_more_tokens_than_are_worked_on_at_a_time() -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 70, VOCABULARY)
    found = label_gradient(logits, torch.ones(3, 70, dtype=torch.bool))
    torch.testing.assert_close(found.sum(-1), torch.zeros(3, 70), rtol=0, atol=1e-6)
    assert int((found < 0).sum()) == 210


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_draws_alike(dtype: torch.dtype) -> None:
    halves = _logits(dtype)
    found = label_gradient(halves, PREDICTING, torch.Generator().manual_seed(0))
    exact = label_gradient(halves.float(), PREDICTING, torch.Generator().manual_seed(0))
    assert found.dtype == dtype
    torch.testing.assert_close(found, exact.to(dtype))


def test_words_without_probability_are_never_drawn() -> None:
    logits = torch.full((1, 1, VOCABULARY), -torch.inf)
    logits[..., 2] = 0.0
    for _ in range(20):
        assert not label_gradient(logits, torch.ones(1, 1, dtype=torch.bool)).any()
