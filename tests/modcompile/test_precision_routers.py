import torch
from torch import nn

from modcompile.precision_routers import PrecisionRouter, SoftMixer

_HIDDEN = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
_MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]], dtype=torch.bool).unsqueeze(-1)


def _router(dropout: float = 0.0) -> PrecisionRouter:
    torch.manual_seed(0)
    return PrecisionRouter(8, 3, dropout=dropout)


def _trained() -> PrecisionRouter:
    router = _router()
    last = router.layers[-1]
    assert isinstance(last, nn.Linear)
    nn.init.normal_(last.weight)
    return router


def test_starts_with_a_slight_preference_for_more_bits() -> None:
    logits = _router()(_HIDDEN, _MASK)
    assert logits.tolist() == [[0, 0.5, 1], [0, 0.5, 1]]


def test_reads_the_mean_of_the_tokens() -> None:
    router = _trained()
    expected = router.layers(torch.stack([_HIDDEN[0, 2:].mean(0), _HIDDEN[1].mean(0)]))
    torch.testing.assert_close(router(_HIDDEN, _MASK), expected)


def test_padding_changes_nothing() -> None:
    router, other = _trained(), _HIDDEN.clone()
    other[0, :2] = 100
    torch.testing.assert_close(router(other, _MASK), router(_HIDDEN, _MASK), rtol=0, atol=0)


def test_a_row_of_padding_gives_numbers() -> None:
    assert torch.isfinite(_trained()(_HIDDEN, torch.zeros_like(_MASK))).all()


def test_dropout_is_for_training() -> None:
    router = _router(dropout=0.5)
    last = router.layers[-1]
    assert isinstance(last, nn.Linear)
    nn.init.normal_(last.weight)
    assert not torch.equal(router.train()(_HIDDEN, _MASK), router(_HIDDEN, _MASK))
    assert torch.equal(router.eval()(_HIDDEN, _MASK), router(_HIDDEN, _MASK))


def test_it_has_three_layers_of_the_widths_that_it_says() -> None:
    shapes = [tuple(tensor.shape) for tensor in _router().parameters()]
    assert shapes == [(128, 8), (128,), (128, 128), (128,), (3, 128), (3,)]


def test_weights_are_the_softmax_of_the_logits() -> None:
    logits = torch.tensor([[0.0, 1.0], [3.0, 3.0]])
    torch.testing.assert_close(SoftMixer()(logits), logits.softmax(-1).view(2, 1, 2))
