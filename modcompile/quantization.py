"""Group-wise integer quantization of weights, and codes packed as `MatMulNBits` reads them.

Shapes: a weight is `[N, K]` (out and in features). Its groups are G = ceil(K / group_size) runs of `group_size` input
features of one output feature; the last is filled up with zeros. Codes are unsigned, `weight = (code - zero_point) *
scale`, with one scale and one zero point a group. Packed, codes are uint8 `[N, G, group_size * bits / 8]`, the first
code in the lowest bits of a byte: the layout of
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.MatMulNBits
"""

from dataclasses import dataclass

import torch
from torch.nn import functional

from modcompile.precision_config import RoundingMethod

_SHRINKS = torch.linspace(1.0, 0.5, 26)
"""How far the search for a better scale goes: at half of the range, clipping costs more than rounding ever does."""


@dataclass(frozen=True)
class QuantizedWeight:
    """Codes, scales and zero points of one weight at one number of bits."""

    codes: torch.Tensor
    """uint8 `[N, G, group_size]`, one code a byte."""
    scales: torch.Tensor
    """float32 `[N, G]`."""
    zero_points: torch.Tensor
    """uint8 `[N, G]`."""
    num_bits: int

    def dequantize(self, in_features: int) -> torch.Tensor:
        """The float32 weight `[N, in_features]`."""
        steps = self.codes.float() - self.zero_points.float().unsqueeze(-1)
        return (steps * self.scales.unsqueeze(-1)).flatten(1)[:, :in_features]


def quantize(
    weight: torch.Tensor, num_bits: int, group_size: int, *, symmetric: bool = True, method: RoundingMethod = "mse"
) -> QuantizedWeight:
    """Quantize a weight `[N, K]`, each group on its own.

    `rtn` rounds to the nearest of the steps that span the group; `mse` also tries narrower spans, which clip the
    group's extremes and resolve the rest better, and takes for each group the one with the least squared error.
    Symmetric, the zero point is the middle code, and the sign of the scale is free: the group's extreme of larger
    magnitude gets the code that the other side lacks.
    """
    groups = split_groups(weight.float(), group_size)
    scales, zero_points = choose_qparams(groups, num_bits, symmetric=symmetric)
    best = _rounded(groups, scales, zero_points, num_bits)
    if method == "mse":
        least = _squared_error(groups, best)
        for shrink in _SHRINKS[1:].tolist():
            span = groups.clamp(groups.amin(-1, keepdim=True) * shrink, groups.amax(-1, keepdim=True) * shrink)
            candidate = _rounded(groups, *choose_qparams(span, num_bits, symmetric=symmetric), num_bits)
            error = _squared_error(groups, candidate)
            better = error < least
            least = torch.where(better, error, least)
            best = _chosen(better, candidate, best)
    return best


def choose_qparams(groups: torch.Tensor, num_bits: int, *, symmetric: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zero points `[N, G]` that span groups `[N, G, group_size]`; zero is always one of the steps."""
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    if symmetric:
        middle = 2 ** (num_bits - 1)
        extreme = torch.where(high > -low, high, low)
        scales = extreme / -middle
        zero_points = torch.full_like(extreme, middle)
    else:
        scales = (high - low) / (2**num_bits - 1)
        zero_points = (-low / _nonzero(scales)).round()
    return _nonzero(scales), zero_points.to(torch.uint8)


def split_groups(weight: torch.Tensor, group_size: int) -> torch.Tensor:
    """`[N, K]` → `[N, G, group_size]`, filled up with zeros."""
    missing = -weight.shape[1] % group_size
    return functional.pad(weight, (0, missing)).reshape(weight.shape[0], -1, group_size)


def pack(codes: torch.Tensor, num_bits: int) -> torch.Tensor:
    """uint8 codes `[…, n]` → bytes `[…, n * num_bits / 8]`, the first code in the lowest bits."""
    per_byte = 8 // num_bits
    shifts = torch.arange(per_byte, dtype=torch.int32) * num_bits
    parts = codes.reshape(*codes.shape[:-1], -1, per_byte).to(torch.int32) << shifts.to(codes.device)
    return parts.sum(-1).to(torch.uint8)


def unpack(packed: torch.Tensor, num_bits: int) -> torch.Tensor:
    """The inverse of `pack`."""
    shifts = torch.arange(8 // num_bits, dtype=torch.int32, device=packed.device) * num_bits
    codes: torch.Tensor = (packed.to(torch.int32).unsqueeze(-1) >> shifts) & (2**num_bits - 1)
    return codes.flatten(-2).to(torch.uint8)


def _rounded(groups: torch.Tensor, scales: torch.Tensor, zero_points: torch.Tensor, num_bits: int) -> QuantizedWeight:
    codes = (groups / scales.unsqueeze(-1)).round() + zero_points.unsqueeze(-1)
    return QuantizedWeight(codes.clamp(0, 2**num_bits - 1).to(torch.uint8), scales, zero_points, num_bits)


def _squared_error(groups: torch.Tensor, quantized: QuantizedWeight) -> torch.Tensor:
    """`[N, G]`."""
    steps = quantized.codes.float() - quantized.zero_points.float().unsqueeze(-1)
    return (steps * quantized.scales.unsqueeze(-1) - groups).square().sum(-1)


def _chosen(where: torch.Tensor, one: QuantizedWeight, other: QuantizedWeight) -> QuantizedWeight:
    return QuantizedWeight(
        torch.where(where.unsqueeze(-1), one.codes, other.codes),
        torch.where(where, one.scales, other.scales),
        torch.where(where, one.zero_points, other.zero_points),
        one.num_bits,
    )


def _nonzero(scales: torch.Tensor) -> torch.Tensor:
    # A group of zeros: any scale keeps it.
    return torch.where(scales == 0, 1.0, scales)
