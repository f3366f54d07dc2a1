"""One weight at several precisions, stored so that a higher one is built upon the lower.

Nested, each precision adds a part to the one below::

    W4 = hi                    hi: 4 bits
    W8 = hi + lo               lo: 4 bits, what rounding to hi left over

so that 4 and 8 bits together take 8 bits a weight. Every part has scales of its own: `hi` is the weight that 4 bits
alone would be, to the last bit, and `lo` resolves also what `hi` has clipped. Separate, each precision is quantized
from the original on its own, and takes its own place.

16 stands for the original weight, which is not stored here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch

from modcompile.gptq import quantize_gptq
from modcompile.precision_config import PRECISIONS, QuantizationConfig
from modcompile.quantization import QuantizedWeight, pack, quantize, unpack

FULL_PRECISION = 16


class DequantizableWeight(Protocol):
    """A weight `[N, K]` that can be had at several precisions."""

    def dequantize(self, precision: int) -> torch.Tensor:
        """The float32 weight at `precision`."""


@dataclass(frozen=True)
class PackedWeight:
    """A part of a weight as it is stored: codes packed as in `modcompile.quantization.pack`."""

    packed: torch.Tensor
    """uint8 `[N, G, group_size * bits / 8]`."""
    scales: torch.Tensor
    """float32 `[N, G]`."""
    zero_points: torch.Tensor
    """uint8 `[N, G]`."""
    num_bits: int

    @classmethod
    def of(cls, quantized: QuantizedWeight) -> "PackedWeight":
        """Pack the codes of a quantized weight."""
        packed = pack(quantized.codes, quantized.num_bits)
        return cls(packed, quantized.scales, quantized.zero_points, quantized.num_bits)

    @property
    def group_size(self) -> int:
        """How many input features share a scale."""
        return self.packed.shape[-1] * 8 // self.num_bits

    def dequantize(self, in_features: int) -> torch.Tensor:
        """The float32 weight `[N, in_features]`."""
        codes = unpack(self.packed, self.num_bits)
        return QuantizedWeight(codes, self.scales, self.zero_points, self.num_bits).dequantize(in_features)


@dataclass(frozen=True)
class MultiPrecisionWeight:
    """The parts of one weight `[N, in_features]`, by the precision that each of them completes."""

    parts: Mapping[int, PackedWeight]
    in_features: int
    nested: bool

    @property
    def group_size(self) -> int:
        """How many input features share a scale."""
        return next(iter(self.parts.values())).group_size

    def used_parts(self, precision: int) -> dict[int, PackedWeight]:
        """The parts whose sum is the weight at `precision`, the first first."""
        if not self.nested:
            return {precision: self.parts[precision]}
        return {completed: part for completed, part in sorted(self.parts.items()) if completed <= precision}

    def dequantize(self, precision: int) -> torch.Tensor:
        """The float32 weight at `precision`."""
        first, *rest = (part.dequantize(self.in_features) for part in self.used_parts(precision).values())
        return sum(rest, start=first)


def part_bits(precisions: Sequence[int], *, nested: bool) -> dict[int, int]:
    """The bits of each stored part, by the precision that it completes, the lowest first.

    Nested, 8 bits are built on 2 through 4 even if nobody asked for 4: no runtime multiplies by codes of 6 bits.
    """
    quantized = sorted(precision for precision in precisions if precision != FULL_PRECISION)
    if not nested or not quantized:
        return {precision: precision for precision in quantized}
    chain = [precision for precision in PRECISIONS if quantized[0] <= precision <= quantized[-1]]
    return {chain[0]: chain[0]} | {upper: upper - lower for lower, upper in pairwise(chain)}


def quantize_weight(
    weight: torch.Tensor, config: QuantizationConfig, factor: torch.Tensor | None = None
) -> MultiPrecisionWeight:
    """Quantize a weight `[N, K]` to all precisions of `config`, the original's excepted.

    With the `factor` `[K, K]` of its inputs (`modcompile.gptq.factor_inverse`) each part is rounded for them, the first
    as if it were alone; otherwise to nearest.
    """
    nested = config.weight_sharing == "nested"
    parts: dict[int, PackedWeight] = {}
    left = weight.float()
    for precision, num_bits in part_bits(config.precisions, nested=nested).items():
        # What is left after the first part lies around zero.
        symmetric = config.symmetric or (nested and bool(parts))
        if factor is None:
            quantized = quantize(left, num_bits, config.group_size, symmetric=symmetric)
        else:
            quantized = quantize_gptq(left, factor, num_bits, config.group_size, symmetric=symmetric)
        parts[precision] = PackedWeight.of(quantized)
        if nested:
            left = left - quantized.dequantize(weight.shape[1])
    return MultiPrecisionWeight(parts, weight.shape[1], nested)
