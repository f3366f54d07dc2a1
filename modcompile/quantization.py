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

_SHARES = tuple(step / 20 for step in range(19, 7, -1))
"""Of a group's span, from 0.95 to 0.4: below, clipping costs more than it gains even at 2 bits."""


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
        steps = self.codes.float().sub_(self.zero_points.float().unsqueeze(-1))
        return steps.mul_(self.scales.unsqueeze(-1)).flatten(1)[:, :in_features]


def quantize(weight: torch.Tensor, num_bits: int, group_size: int, *, symmetric: bool = True) -> QuantizedWeight:
    """Quantize a weight `[N, K]`, each group on its own: round to the nearest of the steps that span it.

    Symmetric, the zero point is the middle code, and the sign of the scale is free: the group's extreme of larger
    magnitude gets the code that the other side lacks.
    """
    groups = split_groups(weight.float(), group_size)
    scales, zero_points = choose_qparams(groups, num_bits, symmetric=symmetric)
    codes = round_to_codes(groups, scales.unsqueeze(-1), zero_points.unsqueeze(-1), num_bits)
    return QuantizedWeight(codes.to(torch.uint8), scales, zero_points, num_bits)


def choose_qparams(groups: torch.Tensor, num_bits: int, *, symmetric: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zero points `[…]` that span groups `[…, group_size]`; zero is always one of the steps."""
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


def choose_clipped_qparams(
    groups: torch.Tensor, num_bits: int, *, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same for the share of each group's span at which rounding makes the least squared error.

    A narrower span clips the group's extremes and resolves the rest better.
    """
    scales, zero_points = choose_qparams(groups, num_bits, symmetric=symmetric)
    least = _squared_error(groups, scales, zero_points, num_bits)
    for share in _SHARES:
        narrower = choose_qparams(groups * share, num_bits, symmetric=symmetric)
        error = _squared_error(groups, *narrower, num_bits)
        better = error < least
        least = torch.where(better, error, least)
        scales = torch.where(better, narrower[0], scales)
        zero_points = torch.where(better, narrower[1], zero_points)
    return scales, zero_points


def round_to_codes(
    weights: torch.Tensor, scales: torch.Tensor, zero_points: torch.Tensor, num_bits: int
) -> torch.Tensor:
    """The codes of the nearest steps, in floating point; all arguments broadcast."""
    return (weights / scales).round_().add_(zero_points).clamp_(0, 2**num_bits - 1)


def split_groups(weight: torch.Tensor, group_size: int) -> torch.Tensor:
    """`[N, K]` → `[N, G, group_size]`, filled up with zeros."""
    missing = -weight.shape[1] % group_size
    filled: torch.Tensor = functional.pad(weight, (0, missing)) if missing else weight
    return filled.reshape(weight.shape[0], -1, group_size)


def pack(codes: torch.Tensor, num_bits: int) -> torch.Tensor:
    """uint8 codes `[…, n]` → bytes `[…, n * num_bits / 8]`, the first code in the lowest bits."""
    parts = codes.unflatten(-1, (-1, 8 // num_bits)).unbind(-1)
    packed: torch.Tensor = parts[0].clone(memory_format=torch.contiguous_format)
    for index, part in enumerate(parts[1:], 1):
        packed.bitwise_or_(part << index * num_bits)
    return packed


def unpack(packed: torch.Tensor, num_bits: int) -> torch.Tensor:
    """The inverse of `pack`."""
    shifts = torch.arange(8 // num_bits, dtype=torch.uint8, device=packed.device) * num_bits
    codes: torch.Tensor = packed.unsqueeze(-1) >> shifts
    return codes.bitwise_and_(2**num_bits - 1).flatten(-2)


def _squared_error(
    groups: torch.Tensor, scales: torch.Tensor, zero_points: torch.Tensor, num_bits: int
) -> torch.Tensor:
    """`[…]` of groups `[…, group_size]`."""
    zeros = zero_points.float().unsqueeze(-1)
    codes = round_to_codes(groups, scales.unsqueeze(-1), zeros, num_bits)
    return ((codes - zeros) * scales.unsqueeze(-1) - groups).square().sum(-1)


def _nonzero(scales: torch.Tensor) -> torch.Tensor:
    # A group of zeros: any scale keeps it.
    return torch.where(scales == 0, 1.0, scales)
