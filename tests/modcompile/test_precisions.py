from typing import Literal

import pytest
import torch

from modcompile.gptq import factor_inverse, quantize_gptq
from modcompile.precision_config import QuantizationConfig
from modcompile.precisions import part_bits, quantize_weight
from modcompile.quantization import quantize

_WEIGHT = torch.randn(64, 200, generator=torch.Generator().manual_seed(0))


def _error(dense: torch.Tensor) -> float:
    return float((dense - _WEIGHT).norm() / _WEIGHT.norm())


@pytest.mark.parametrize(
    ("precisions", "nested", "expected"),
    [
        ((4, 8, 16), True, {4: 4, 8: 4}),
        ((2, 4, 8), True, {2: 2, 4: 2, 8: 4}),
        ((2, 8), True, {2: 2, 4: 2, 8: 4}),
        ((2, 8), False, {2: 2, 8: 8}),
        ((8, 4), False, {4: 4, 8: 8}),
        ((16,), True, {}),
        ((4,), True, {4: 4}),
    ],
)
def test_nested_parts_add_up_to_the_bits_of_the_highest(
    precisions: tuple[int, ...], nested: bool, expected: dict[int, int]
) -> None:
    assert part_bits(precisions, nested=nested) == expected


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_child_is_what_its_bits_alone_would_be(symmetric: bool) -> None:
    weight = quantize_weight(_WEIGHT, QuantizationConfig(precisions=[4, 8], symmetric=symmetric))
    alone = quantize(_WEIGHT, 4, 64, symmetric=symmetric).dequantize(200)
    torch.testing.assert_close(weight.dequantize(4), alone, rtol=0, atol=0)


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_parent_is_nearly_what_its_bits_alone_would_be(symmetric: bool) -> None:
    config = QuantizationConfig(precisions=[4, 8], symmetric=symmetric)
    alone = quantize(_WEIGHT, 8, 64, symmetric=symmetric).dequantize(200)
    assert _error(quantize_weight(_WEIGHT, config).dequantize(8)) < 2 * _error(alone)


@pytest.mark.parametrize("sharing", ["nested", "separate"])
def test_parts_are_rounded_for_their_inputs(sharing: Literal["nested", "separate"]) -> None:
    x = torch.randn(300, 200, generator=torch.Generator().manual_seed(1))
    x += 2 * x.roll(1, dims=1)
    factor = factor_inverse(x.T @ x)
    config = QuantizationConfig(precisions=[4, 8], weight_sharing=sharing)
    found, nearest = quantize_weight(_WEIGHT, config, factor), quantize_weight(_WEIGHT, config)
    first = quantize_gptq(_WEIGHT, factor, 4, 64).dequantize(200)
    left = _WEIGHT - first if sharing == "nested" else _WEIGHT
    second = quantize_gptq(left, factor, 4 if sharing == "nested" else 8, 64).dequantize(200)
    assert torch.equal(found.dequantize(4), first)
    assert torch.equal(found.dequantize(8), first + second if sharing == "nested" else second)
    lost, most = ((x @ (weight.dequantize(4) - _WEIGHT).T).norm() for weight in (found, nearest))
    assert float(lost) < 0.8 * float(most)


@pytest.mark.parametrize("sharing", ["nested", "separate"])
def test_more_bits_lose_less(sharing: Literal["nested", "separate"]) -> None:
    config = QuantizationConfig(precisions=[2, 4, 8], weight_sharing=sharing)
    weight = quantize_weight(_WEIGHT, config)
    two, four, eight = (_error(weight.dequantize(precision)) for precision in (2, 4, 8))
    assert eight < four / 4 < two / 4


def test_nested_parts_are_stored_once() -> None:
    nested = quantize_weight(_WEIGHT, QuantizationConfig(precisions=[4, 8]))
    separate = quantize_weight(_WEIGHT, QuantizationConfig(precisions=[4, 8], weight_sharing="separate"))
    assert [sum(part.packed.numel() for part in weight.parts.values()) for weight in (nested, separate)] == [
        64 * 256,
        64 * 256 * 3 // 2,
    ]
    assert list(nested.used_parts(4)) == [4]
    assert list(nested.used_parts(8)) == [4, 8]
    assert list(separate.used_parts(8)) == [8]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_takes_weights_of_any_dtype(dtype: torch.dtype) -> None:
    weight = quantize_weight(_WEIGHT.to(dtype), QuantizationConfig(precisions=[4, 8]))
    assert weight.dequantize(8).dtype == torch.float32
    assert _error(weight.dequantize(8)) < 0.02
