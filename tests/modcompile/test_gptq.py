import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modcompile.gptq import factor_inverse, quantize_gptq
from modcompile.quantization import (
    QuantizedWeight,
    choose_clipped_qparams,
    choose_qparams,
    quantize,
    round_to_codes,
    split_groups,
)

BITS = st.sampled_from([2, 4, 8])
GROUP = 32


def _weight(seed: int, rows: int = 24, columns: int = 80) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def _hessian(seed: int, size: int = 80) -> torch.Tensor:
    """Of inputs that go together, as those of a network do: a few directions hold most of them."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(size // 8, size, generator=generator, dtype=torch.float64)
    x = torch.randn(400, size // 8, generator=generator, dtype=torch.float64) @ mixing
    x += 0.3 * torch.randn(400, size, generator=generator, dtype=torch.float64)
    return x.T @ x


def _change(weight: torch.Tensor, quantized: QuantizedWeight, hessian: torch.Tensor) -> float:
    """tr((W - Q) H (W - Q)ᵀ)."""
    lost = (weight - quantized.dequantize(weight.shape[1])).double()
    return float((lost @ hessian @ lost.T).trace())


def _qparams(groups: torch.Tensor, num_bits: int, *, symmetric: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Only two bits clip."""
    choose = choose_clipped_qparams if num_bits == 2 else choose_qparams
    return choose(groups, num_bits, symmetric=symmetric)


def _literally(
    weight: torch.Tensor, hessian: torch.Tensor, num_bits: int, group_size: int, symmetric: bool
) -> torch.Tensor:
    """What the paper says in formulas: round a column, spread its error, take it out of the inverse."""
    left = weight.double().clone()
    damped = hessian + 0.1 * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    rounded = torch.empty_like(left)
    for column in range(weight.shape[1]):
        inverse = torch.linalg.inv(damped[column:, column:])
        if column % group_size == 0:
            group = left[:, column : column + group_size].float()
            scales, zero_points = _qparams(group, num_bits, symmetric=symmetric)
        codes = ((left[:, column] / scales).round() + zero_points).clamp(0, 2**num_bits - 1)
        rounded[:, column] = (codes - zero_points.double()) * scales
        error = (left[:, column] - rounded[:, column]) / inverse[0, 0]
        left[:, column:] -= error[:, None] * inverse[0]
    return rounded


@given(seed=st.integers(0, 99), bits=BITS, symmetric=st.booleans())
def test_changes_products_less_than_rounding_to_nearest(seed: int, bits: int, symmetric: bool) -> None:
    weight, hessian = _weight(seed), _hessian(seed)
    found = quantize_gptq(weight, factor_inverse(hessian), bits, GROUP, symmetric=symmetric)
    nearest = quantize(weight, bits, GROUP, symmetric=symmetric)
    assert _change(weight, found, hessian) < 0.7 * _change(weight, nearest, hessian)


@given(seed=st.integers(0, 99), bits=st.sampled_from([2, 4]), symmetric=st.booleans())
def test_is_what_the_formulas_say(seed: int, bits: int, symmetric: bool) -> None:
    weight, hessian = _weight(seed), _hessian(seed)
    found = quantize_gptq(weight, factor_inverse(hessian), bits, GROUP, symmetric=symmetric).dequantize(80).double()
    expected = _literally(weight, hessian, bits, GROUP, symmetric)
    # Where float32 rounds a weight half way between two steps the other way, its row goes on otherwise: rare.
    same = torch.isclose(found, expected, rtol=0, atol=1e-3).all(1)
    assert float(same.float().mean()) > 0.8


@given(seed=st.integers(0, 99), bits=BITS, symmetric=st.booleans())
def test_rounds_to_nearest_where_inputs_are_independent(seed: int, bits: int, symmetric: bool) -> None:
    weight = _weight(seed, columns=70)
    found = quantize_gptq(weight, factor_inverse(torch.eye(70)), bits, GROUP, symmetric=symmetric)
    groups = split_groups(weight, GROUP)
    scales, zero_points = _qparams(groups, bits, symmetric=symmetric)
    assert torch.equal(found.scales, scales)
    assert torch.equal(found.zero_points, zero_points)
    nearest = round_to_codes(groups, scales.unsqueeze(-1), zero_points.unsqueeze(-1), bits)
    assert torch.equal(found.codes, nearest.to(torch.uint8))


@given(seed=st.integers(0, 99), bits=BITS, symmetric=st.booleans())
def test_fills_the_last_group_with_zeros(seed: int, bits: int, symmetric: bool) -> None:
    weight, hessian = _weight(seed, columns=70), _hessian(seed, 70)
    found = quantize_gptq(weight, factor_inverse(hessian), bits, GROUP, symmetric=symmetric)
    assert found.codes.shape == (24, 3, GROUP)
    assert found.scales.shape == found.zero_points.shape == (24, 3)
    assert int(found.codes.max()) < 2**bits
    assert not found.dequantize(96)[:, 70:].any()
    assert _change(weight, found, hessian) < _change(
        weight, quantize(weight, bits, GROUP, symmetric=symmetric), hessian
    )


def test_weights_of_inputs_that_never_occur_are_rounded_to_nearest() -> None:
    weight, hessian = _weight(0, columns=64), _hessian(0, 64)
    dead = torch.zeros(64, dtype=torch.bool)
    dead[32:] = True
    hessian[dead] = hessian[:, dead] = 0
    found = quantize_gptq(weight, factor_inverse(hessian), 4, GROUP).dequantize(64)
    nearest = quantize_gptq(weight, factor_inverse(torch.eye(64)), 4, GROUP).dequantize(64)
    torch.testing.assert_close(found[:, dead], nearest[:, dead], rtol=0, atol=0)
    assert not torch.equal(found[:, ~dead], nearest[:, ~dead])
    alone = quantize_gptq(weight[:, ~dead], factor_inverse(hessian[~dead][:, ~dead]), 4, GROUP).dequantize(32)
    # The damping is half as much: a share of the mean over all inputs.
    assert float((found[:, ~dead] - alone).norm() / alone.norm()) < 0.1


def test_takes_a_text_that_gives_no_inputs_at_all() -> None:
    weight = _weight(0, columns=64)
    found = quantize_gptq(weight, factor_inverse(torch.zeros(64, 64)), 4, GROUP)
    assert torch.equal(found.codes, quantize_gptq(weight, factor_inverse(torch.eye(64)), 4, GROUP).codes)


def test_the_factor_is_that_of_the_damped_inverse() -> None:
    hessian = _hessian(0)
    factor = factor_inverse(hessian)
    assert factor.dtype == torch.float32
    assert torch.equal(factor, factor.triu())
    damped = hessian + 0.1 * hessian.diagonal().mean() * torch.eye(80, dtype=torch.float64)
    torch.testing.assert_close(factor.T.double() @ factor.double() @ damped, torch.eye(80).double(), rtol=0, atol=1e-4)


def test_takes_fewer_tokens_than_inputs() -> None:
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weight, hessian = _weight(0, columns=64), x.T @ x
    found = quantize_gptq(weight, factor_inverse(hessian), 4, GROUP)
    assert _change(weight, found, hessian) < 0.1 * _change(weight, quantize(weight, 4, GROUP), hessian)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_refuses_a_hessian_that_is_not_finite(value: float) -> None:
    hessian = _hessian(0)
    hessian[3, 4] = value
    with pytest.raises(ValueError, match="NaN or infinity"):
        factor_inverse(hessian)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_takes_weights_of_any_dtype_and_leaves_them_alone(dtype: torch.dtype) -> None:
    weight, factor = _weight(0).to(dtype), factor_inverse(_hessian(0))
    before = weight.clone()
    found = quantize_gptq(weight, factor, 8, GROUP).dequantize(80)
    assert found.dtype == torch.float32
    assert torch.equal(weight, before)
    assert float((found - weight).norm() / weight.norm()) < 0.05
