import pytest
import torch
from torch import nn

from modcompile.routers import DepthRouter, HardenedGate, SoftGate, StraightThroughGate

_HIDDEN, _INNER = 6, 4


def _router(*, dropout: float = 0.0, layer_norm: bool = True) -> DepthRouter:
    torch.manual_seed(0)
    return DepthRouter(_HIDDEN, _INNER, dropout=dropout, layer_norm=layer_norm, init_bias=1.5)


def _hidden_state() -> torch.Tensor:
    return torch.randn(2, 3, _HIDDEN, generator=torch.Generator().manual_seed(0))


def test_starts_at_its_bias_for_every_token() -> None:
    assert torch.equal(_router()(_hidden_state()), torch.full((2, 3, 1), 1.5))


@pytest.mark.parametrize(
    ("layer_norm", "first"),
    [(True, {"norm.weight": (_HIDDEN,), "norm.bias": (_HIDDEN,)}), (False, {"up.bias": (_INNER,)})],
)
def test_has_one_bias_before_the_activation(layer_norm: bool, first: dict[str, tuple[int, ...]]) -> None:
    router = _router(layer_norm=layer_norm)
    shapes = {name: tuple(tensor.shape) for name, tensor in router.score.state_dict().items()}
    assert shapes == first | {"up.weight": (_INNER, _HIDDEN), "down.weight": (1, _INNER)}


def test_computes_norm_linear_silu_linear_bias() -> None:
    router, hidden = _router(), _hidden_state()
    score = router.score
    for parameter in router.parameters():
        nn.init.normal_(parameter)
    assert isinstance(score.norm, nn.LayerNorm)
    normed = (hidden - hidden.mean(-1, keepdim=True)) / (hidden.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    inner = (normed * score.norm.weight + score.norm.bias) @ score.up.weight.T
    expected = (inner * torch.sigmoid(inner)) @ score.down.weight.T + router.bias
    torch.testing.assert_close(router(hidden), expected)


@pytest.mark.parametrize("layer_norm", [True, False])
def test_norm_makes_the_size_of_the_input_irrelevant(layer_norm: bool) -> None:
    router, hidden = _router(layer_norm=layer_norm), _hidden_state()
    nn.init.normal_(router.score.down.weight)
    close = torch.allclose(router(hidden), router(100 * hidden), atol=1e-4)
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
