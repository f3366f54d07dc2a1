"""Multiplying by a quantized weight, and looking up in it, without making it.

Both have a PyTorch reference here; ONNX Runtime has them as
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.MatMulNBits and
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.GatherBlockQuantized

They read a weight `[N, K]` as codes uint8 `[N, G, bytes]`, scales `[N, G]` and zero points uint8
`[N, ceil(G * num_bits / 8)]`, packed like codes; without zero points, these are the middle code.
"""

import torch

from modcompile.precisions import PackedWeight
from modcompile.quantization import QuantizedWeight, pack, unpack


def operands(weight: PackedWeight) -> dict[str, torch.Tensor]:
    """What the operators read of a weight, by name and in their order; zero points only where they are needed."""
    inputs = {"packed": weight.packed, "scales": weight.scales}
    if bool((weight.zero_points != 2 ** (weight.num_bits - 1)).any()):
        per_byte = 8 // weight.num_bits
        padded = torch.nn.functional.pad(weight.zero_points, (0, -weight.zero_points.shape[1] % per_byte))
        inputs["zero_points"] = pack(padded, weight.num_bits)
    return inputs


@torch.library.custom_op("modcompile::matmul_nbits", mutates_args=())
def matmul_nbits(
    x: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor, zero_points: torch.Tensor | None, num_bits: int
) -> torch.Tensor:
    """`linear(x, weight)` of x `[…, K]`."""
    weight = _dequantize(packed, scales, zero_points, num_bits, x.shape[-1])
    return torch.nn.functional.linear(x, weight.to(x.dtype))


@matmul_nbits.register_fake
def _(
    x: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor, zero_points: torch.Tensor | None, num_bits: int
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], packed.shape[0])


@torch.library.custom_op("modcompile::gather_block_quantized", mutates_args=())
def gather_block_quantized(
    ids: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor | None,
    num_bits: int,
    width: int,
) -> torch.Tensor:
    """`embedding(ids, weight)` of ids `[…]` and a weight `[N, width]`: `[…, width]`."""
    rows = ids.flatten()
    points = None if zero_points is None else zero_points[rows]
    found = _dequantize(packed[rows], scales[rows], points, num_bits, width)
    return found.reshape(*ids.shape, width).contiguous()


@gather_block_quantized.register_fake
def _(
    ids: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor | None,
    num_bits: int,
    width: int,
) -> torch.Tensor:
    return scales.new_empty(*ids.shape, width)


def _dequantize(
    packed: torch.Tensor, scales: torch.Tensor, zero_points: torch.Tensor | None, num_bits: int, width: int
) -> torch.Tensor:
    """`[N, width]`."""
    if zero_points is None:
        unpacked = torch.full_like(scales, 2 ** (num_bits - 1), dtype=torch.uint8)
    else:
        unpacked = unpack(zero_points, num_bits)[:, : scales.shape[1]]
    return QuantizedWeight(unpack(packed, num_bits), scales, unpacked, num_bits).dequantize(width)


MATMUL_NBITS = torch.ops.modcompile.matmul_nbits.default
GATHER_BLOCK_QUANTIZED = torch.ops.modcompile.gather_block_quantized.default
