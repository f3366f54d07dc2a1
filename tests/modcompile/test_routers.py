import math

import pytest
import torch
from torch import nn

from modcompile.routers import DepthRouter, DepthScore, HardConcreteGate, HardenedGate, SoftGate, StraightThroughGate

_HIDDEN, _INNER = 6, 4
_WIDTHS = pytest.mark.parametrize("inner", [_INNER, 0], ids=["hidden layer", "linear"])


def _router(inner: int = _INNER, *, dropout: float = 0.0, layer_norm: bool = True) -> DepthRouter:
    torch.manual_seed(0)
    return DepthRouter(_HIDDEN, inner, dropout=dropout, layer_norm=layer_norm, init_bias=1.5)


def _hidden_state() -> torch.Tensor:
    return torch.randn(2, 3, _HIDDEN, generator=torch.Generator().manual_seed(0))


def _normed(hidden: torch.Tensor) -> torch.Tensor:
    centred = hidden - hidden.mean(-1, keepdim=True)
    return centred / (hidden.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()


@_WIDTHS
def test_starts_at_its_bias_for_every_token(inner: int) -> None:
    assert torch.equal(_router(inner)(_hidden_state()), torch.full((2, 3, 1), 1.5))


@pytest.mark.parametrize(
    ("inner", "layer_norm", "shapes"),
    [
        (_INNER, True, {"norm.weight": (_HIDDEN,), "norm.bias": (_HIDDEN,), "up.weight": (_INNER, _HIDDEN)}),
        (_INNER, False, {"up.bias": (_INNER,), "up.weight": (_INNER, _HIDDEN)}),
        (0, True, {}),
        (0, False, {}),
    ],
)
def test_has_one_bias_before_the_activation(inner: int, layer_norm: bool, shapes: dict[str, tuple[int, ...]]) -> None:
    router = _router(inner, layer_norm=layer_norm)
    found = {name: tuple(tensor.shape) for name, tensor in router.score.state_dict().items()}
    assert found == shapes | {"down.weight": (1, inner or _HIDDEN)}


def test_computes_norm_linear_silu_linear_bias() -> None:
    router, hidden = _router(), _hidden_state()
    score = router.score
    for parameter in router.parameters():
        nn.init.normal_(parameter)
    assert isinstance(score, DepthScore)
    assert isinstance(score.norm, nn.LayerNorm)
    inner = (_normed(hidden) * score.norm.weight + score.norm.bias) @ score.up.weight.T
    expected = (inner * torch.sigmoid(inner)) @ score.down.weight.T + router.bias
    torch.testing.assert_close(router(hidden), expected)


@pytest.mark.parametrize("layer_norm", [True, False])
def test_without_a_hidden_layer_computes_norm_linear_bias(layer_norm: bool) -> None:
    router, hidden = _router(0, layer_norm=layer_norm), _hidden_state()
    for parameter in router.parameters():
        nn.init.normal_(parameter)
    read = _normed(hidden) if layer_norm else hidden
    torch.testing.assert_close(router(hidden), read @ router.score.down.weight.T + router.bias)


@_WIDTHS
@pytest.mark.parametrize("layer_norm", [True, False])
def test_norm_makes_the_size_of_the_input_irrelevant(inner: int, layer_norm: bool) -> None:
    router, hidden = _router(inner, layer_norm=layer_norm), _hidden_state()
    nn.init.normal_(router.score.down.weight)
    close = torch.allclose(router(hidden), router(100 * hidden), atol=1e-3)
    assert close == layer_norm


def test_drops_out_in_training_only() -> None:
    router, hidden = _router(dropout=0.5), _hidden_state()
    nn.init.normal_(router.score.down.weight)
    assert not torch.equal(router(hidden), router(hidden))
    router.eval()
    assert torch.equal(router(hidden), router(hidden))


def test_soft_gate_is_the_sigmoid() -> None:
    logits = torch.linspace(-4, 4, 9)
    torch.testing.assert_close(SoftGate()(logits), 1 / (1 + torch.exp(-logits)))


def test_a_hardened_gate_is_open_or_closed_while_told() -> None:
    logits = torch.tensor([-3.0, 0.0, 1e-3, 3.0])
    gate = HardenedGate(SoftGate())
    assert torch.equal(gate(logits), SoftGate()(logits))
    gate.hard = True
    assert gate(logits).tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_straight_through_is_zero_or_one_forward(requires_grad: bool, dtype: torch.dtype) -> None:
    logits = torch.tensor([-20.0, -1e-3, 0.0, 1e-3, 0.3, 20.0], dtype=dtype, requires_grad=requires_grad)
    gate = StraightThroughGate()(logits)
    assert gate.dtype == dtype
    assert gate.tolist() == [0, 0, 0, 1, 1, 1]


def test_straight_through_has_the_gradient_of_the_sigmoid() -> None:
    logits = torch.linspace(-4, 4, 9, requires_grad=True)
    weights = torch.arange(9.0)
    (StraightThroughGate()(logits) * weights).sum().backward()
    soft = torch.sigmoid(logits.detach())
    torch.testing.assert_close(logits.grad, weights * soft * (1 - soft))


def test_hard_concrete_is_exactly_open_or_closed_at_its_ends_and_decides_as_the_sigmoid() -> None:
    logits = torch.tensor([-9.0, -2.5, -1.0, -1e-3, 0.0, 1e-3, 1.0, 2.5, 9.0])
    gate = HardConcreteGate().eval()(logits)
    assert gate[:2].tolist() == [0, 0]
    assert gate[-2:].tolist() == [1, 1]
    torch.testing.assert_close(gate[2:-2], torch.sigmoid(logits[2:-2]) * 1.2 - 0.1)
    assert torch.equal(gate > 0.5, torch.sigmoid(logits) > 0.5)


@pytest.mark.parametrize("value", [-2.0, 0.0, 3.0])
def test_hard_concrete_draws_from_its_distribution(value: float) -> None:
    """P(gate = 0) = sigmoid(-logits + temperature * logit(1 / 12)), and so for 1: where the stretched sigmoid ends."""
    torch.manual_seed(0)
    gate = HardConcreteGate()
    drawn = gate(torch.full((100_000, 1, 1), value))
    edge = gate.temperature * math.log((1 / 12) / (11 / 12))
    for end, expected in ((0, 1 / (1 + math.exp(value - edge))), (1, 1 / (1 + math.exp(-value - edge)))):
        assert float((drawn == end).float().mean()) == pytest.approx(expected, abs=0.01)
    assert drawn.min() >= 0
    assert drawn.max() <= 1


def test_hard_concrete_learns_where_a_gate_is_between_its_ends() -> None:
    torch.manual_seed(0)
    logits = torch.zeros(200, 1, 1, requires_grad=True)
    gate = HardConcreteGate()(logits)
    gate.sum().backward()
    assert logits.grad is not None
    assert torch.equal(logits.grad != 0, (gate > 0) & (gate < 1))
    assert (logits.grad >= 0).all()
