import torch
from hypothesis import given
from hypothesis import strategies as st

from modcompile.quantization import (
    QuantizedWeight,
    choose_clipped_qparams,
    choose_qparams,
    pack,
    quantize,
    round_to_codes,
    split_groups,
    unpack,
)

BITS = st.sampled_from([2, 4, 8])
GROUP = 32


def _weight(seed: int, rows: int = 3, columns: int = 70) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def _squared_errors(groups: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, bits: int) -> torch.Tensor:
    dense = QuantizedWeight(round_to_codes(groups, scales[..., None], zeros[..., None], bits), scales, zeros, bits)
    return (split_groups(dense.dequantize(64), GROUP) - groups).square().sum(-1)


@given(seed=st.integers(0, 99), bits=BITS, symmetric=st.booleans())
def test_every_weight_is_its_code_times_the_scale(seed: int, bits: int, symmetric: bool) -> None:
    weight = _weight(seed)
    quantized = quantize(weight, bits, GROUP, symmetric=symmetric)
    assert quantized.codes.shape == (3, 3, GROUP)
    assert int(quantized.codes.max()) < 2**bits
    expected = torch.empty_like(weight)
    for row in range(weight.shape[0]):
        for column in range(weight.shape[1]):
            group, place = divmod(column, GROUP)
            code, zero = int(quantized.codes[row, group, place]), int(quantized.zero_points[row, group])
            expected[row, column] = (code - zero) * quantized.scales[row, group]
    torch.testing.assert_close(quantized.dequantize(weight.shape[1]), expected, rtol=0, atol=0)
    if symmetric:
        assert (quantized.zero_points == 2 ** (bits - 1)).all()


@given(seed=st.integers(0, 99), bits=BITS, symmetric=st.booleans())
def test_rounding_to_nearest_is_off_by_half_a_step_at_most(seed: int, bits: int, symmetric: bool) -> None:
    weight = _weight(seed)
    quantized = quantize(weight, bits, GROUP, symmetric=symmetric)
    steps = quantized.scales.abs().repeat_interleave(GROUP, 1)[:, : weight.shape[1]]
    error = (quantized.dequantize(weight.shape[1]) - weight).abs()
    # Where one side of zero has a code less, its extreme is a whole step away, and so is a zero point that was rounded.
    assert bool((error <= steps * (1 + 1e-3)).all())
    assert float((error <= steps * (0.5 + 1e-3)).float().mean()) > 0.9


@given(seed=st.integers(0, 99), bits=BITS, symmetric=st.booleans())
def test_clipping_is_never_worse(seed: int, bits: int, symmetric: bool) -> None:
    groups = split_groups(_weight(seed, columns=64), GROUP)
    whole, clipped = (
        _squared_errors(groups, *choose(groups, bits, symmetric=symmetric), bits)
        for choose in (choose_qparams, choose_clipped_qparams)
    )
    assert bool((clipped <= whole * (1 + 1e-5)).all())


def test_clipping_gives_up_an_outlier_for_the_rest() -> None:
    groups = torch.cat([torch.linspace(-1, 1, 127), torch.tensor([1.5])]).reshape(1, 1, 128)
    (whole, _), (clipped, _) = (
        choose(groups, 2, symmetric=True) for choose in (choose_qparams, choose_clipped_qparams)
    )
    assert float(clipped.abs()) < 0.8 * float(whole.abs())


@given(bits=BITS, symmetric=st.booleans())
def test_zeros_stay_zero(bits: int, symmetric: bool) -> None:
    weight = _weight(0)
    weight[1, :GROUP] = 0
    weight[2, ::2] = 0
    quantized = quantize(weight, bits, GROUP, symmetric=symmetric)
    assert torch.isfinite(quantized.scales).all()
    dense = quantized.dequantize(weight.shape[1])
    assert not dense[1, :GROUP].any()
    assert not dense[2, ::2].any()


def test_a_group_that_is_cut_short_is_filled_with_zeros() -> None:
    groups = split_groups(_weight(0), GROUP)
    assert groups.shape == (3, 3, GROUP)
    assert not groups[:, 2, 6:].any()
    torch.testing.assert_close(groups.flatten(1)[:, :70], _weight(0), rtol=0, atol=0)


def test_a_symmetric_scale_gives_the_extreme_the_code_that_the_other_side_lacks() -> None:
    groups = torch.tensor([[[0.5, -0.8]], [[0.8, -0.5]]])
    scales, zero_points = choose_qparams(groups, 4, symmetric=True)
    torch.testing.assert_close(scales.flatten(), torch.tensor([0.1, -0.1]))
    assert zero_points.tolist() == [[8], [8]]


def test_an_asymmetric_scale_spans_from_the_least_to_the_largest_and_zero() -> None:
    groups = torch.tensor([[[-0.5, 1.0]], [[2.0, 3.0]], [[-3.0, -2.0]]])
    scales, zero_points = choose_qparams(groups, 4, symmetric=False)
    torch.testing.assert_close(scales.flatten(), torch.tensor([0.1, 0.2, 0.2]))
    assert zero_points.flatten().tolist() == [5, 0, 15]


@given(seed=st.integers(0, 99), bits=BITS)
def test_packed_codes_come_back(seed: int, bits: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (2, 3, GROUP), generator=generator, dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (2, 3, GROUP * bits // 8)
    assert packed.dtype == torch.uint8
    assert torch.equal(unpack(packed, bits), codes)


def test_packed_codes_lie_in_one_piece() -> None:
    codes = torch.arange(5 * 4 * 32).remainder(16).to(torch.uint8).reshape(4 * 32, 5).T.reshape(5, 4, 32)
    assert not codes.is_contiguous()
    packed = pack(codes, 4)
    assert packed.is_contiguous()
    assert torch.equal(unpack(packed, 4), codes)


def test_the_first_code_lies_in_the_lowest_bits() -> None:
    assert pack(torch.tensor([1, 2], dtype=torch.uint8), 4).tolist() == [0x21]
    assert pack(torch.tensor([[1, 3], [2, 4]], dtype=torch.uint8).T, 4).tolist() == [[0x21], [0x43]]
    assert pack(torch.tensor([1, 2, 3, 0], dtype=torch.uint8), 2).tolist() == [0b00111001]
    assert pack(torch.tensor([200], dtype=torch.uint8), 8).tolist() == [200]
