import pytest
import torch
from torch import nn

from modcompile.passes.decide_precision import token_weights_of
from modcompile.precision_routers import PrecisionMixer, PrecisionRouter

_HIDDEN = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
_WEIGHTS = token_weights_of(torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]], dtype=torch.bool).unsqueeze(-1))


def _router(dropout: float = 0.0, *, for_tokens: bool = False) -> PrecisionRouter:
    torch.manual_seed(0)
    return PrecisionRouter(8, 3, dropout=dropout, for_tokens=for_tokens)


def _trained(*, for_tokens: bool = False) -> PrecisionRouter:
    router = _router(for_tokens=for_tokens)
    nn.init.normal_(router.last.weight)
    return router


def _expected(router: PrecisionRouter, x: torch.Tensor) -> torch.Tensor:
    """Linear, ReLU, linear, ReLU, linear."""
    for linear in (router.first, router.second):
        x = torch.relu(nn.functional.linear(x, linear.weight, linear.bias))
    logits: torch.Tensor = router.last(x)
    return logits


def test_starts_with_a_slight_preference_for_more_bits() -> None:
    logits = _router()(_HIDDEN, _WEIGHTS)
    assert logits.tolist() == [[[0, 0.5, 1]], [[0, 0.5, 1]]]


def test_reads_the_mean_of_the_tokens() -> None:
    router = _trained()
    expected = _expected(router, torch.stack([_HIDDEN[0, 2:].mean(0), _HIDDEN[1].mean(0)])).unsqueeze(1)
    torch.testing.assert_close(router(_HIDDEN, _WEIGHTS), expected)


def test_padding_changes_nothing() -> None:
    router, other = _trained(), _HIDDEN.clone()
    other[0, :2] = 100
    torch.testing.assert_close(router(other, _WEIGHTS), router(_HIDDEN, _WEIGHTS), rtol=0, atol=0)


def test_a_row_of_padding_gives_numbers() -> None:
    assert torch.isfinite(_trained()(_HIDDEN, torch.zeros_like(_WEIGHTS))).all()


def test_dropout_is_for_training() -> None:
    router = _router(dropout=0.5)
    nn.init.normal_(router.last.weight)
    assert not torch.equal(router.train()(_HIDDEN, _WEIGHTS), router(_HIDDEN, _WEIGHTS))
    assert torch.equal(router.eval()(_HIDDEN, _WEIGHTS), router(_HIDDEN, _WEIGHTS))


def test_it_has_three_layers_of_the_widths_that_it_says() -> None:
    shapes = [tuple(tensor.shape) for tensor in _router().parameters()]
    assert shapes == [(128, 8), (128,), (128, 128), (128,), (3, 128), (3,)]


def test_tells_whether_its_choice_depends_on_the_input() -> None:
    assert not _router().reads_input
    router = _trained()
    assert router.reads_input
    router.prefer(1)
    assert not router.reads_input


def test_can_be_let_prefer_a_precision() -> None:
    router = _trained()
    router.prefer(1)
    assert router(_HIDDEN, _WEIGHTS).argmax(-1).tolist() == [[1], [1]]
    # Slightly: a training can outweigh it.
    assert float(router(_HIDDEN, _WEIGHTS).detach().softmax(-1).max()) < 0.5


def test_out_of_training_its_wide_weights_have_8_bits() -> None:
    router = _trained().eval()
    exact = router.train()(_HIDDEN, _WEIGHTS)
    rounded = router.eval()(_HIDDEN, _WEIGHTS)
    assert 0 < float((rounded - exact).detach().abs().max()) < 0.02
    with torch.no_grad():
        for linear in (router.first, router.second):
            linear.weight.copy_(linear.packed().dequantize(linear.in_features))
    torch.testing.assert_close(router(_HIDDEN, _WEIGHTS), router.train()(_HIDDEN, _WEIGHTS))


def test_rounds_again_after_a_training() -> None:
    """The fused optimizer of the HF Trainer changes weights without counting their versions up."""
    router = _trained().eval()
    before = router(_HIDDEN, _WEIGHTS)
    optimizer = torch.optim.AdamW(router.parameters(), lr=0.1, fused=True)
    router.train()(_HIDDEN, _WEIGHTS).square().sum().backward()
    optimizer.step()
    after = router.eval()(_HIDDEN, _WEIGHTS)
    torch.testing.assert_close(after, _expected_of_copy(router))
    assert not torch.allclose(after, before)


def _expected_of_copy(router: PrecisionRouter) -> torch.Tensor:
    copy = _router()
    copy.load_state_dict(router.state_dict())
    logits: torch.Tensor = copy.eval()(_HIDDEN, _WEIGHTS)
    return logits


def test_gradients_pass_the_rounding() -> None:
    router = _trained().eval()
    router(_HIDDEN, _WEIGHTS).square().sum().backward()
    assert all(parameter.grad is not None and bool(parameter.grad.any()) for parameter in router.parameters())


def test_for_tokens_it_reads_each_of_them() -> None:
    router = _trained(for_tokens=True)
    torch.testing.assert_close(router(_HIDDEN, _WEIGHTS), _expected(router, _HIDDEN))
    assert router(_HIDDEN, _WEIGHTS).shape == (2, 5, 3)


_LOGITS = torch.tensor([[[0.0, 1.0]], [[3.0, 2.0]]])
_OF_LARGEST = [[[0.0, 1.0]], [[1.0, 0.0]]]


def test_soft_weights_are_the_softmax() -> None:
    torch.testing.assert_close(PrecisionMixer(straight_through=False)(_LOGITS), _LOGITS.softmax(-1))


@pytest.mark.parametrize("straight_through", [False, True])
def test_hard_weights_are_of_the_largest(*, straight_through: bool) -> None:
    mixer = PrecisionMixer(straight_through=straight_through)
    mixer.hard = True
    logits = _LOGITS.clone().requires_grad_()
    assert mixer(logits).tolist() == _OF_LARGEST
    assert not mixer(logits).requires_grad


def test_some_of_the_precisions_can_be_taken() -> None:
    trained = _trained()
    router = trained.like(2)
    router.take(trained, [0, 2])
    torch.testing.assert_close(router(_HIDDEN, _WEIGHTS), trained(_HIDDEN, _WEIGHTS)[..., [0, 2]])


def test_straight_through_weights_are_hard_and_have_the_gradient_of_the_softmax() -> None:
    logits, same = _LOGITS.clone().requires_grad_(), _LOGITS.clone().requires_grad_()
    direction = torch.tensor([[[1.0, 2.0]], [[3.0, 5.0]]])
    weights = PrecisionMixer(straight_through=True)(logits)
    assert weights.tolist() == _OF_LARGEST
    (weights * direction).sum().backward()
    (same.softmax(-1) * direction).sum().backward()
    assert logits.grad is not None
    assert same.grad is not None
    torch.testing.assert_close(logits.grad, same.grad)
