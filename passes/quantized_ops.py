"""Multiplying by a quantized weight without making it.

It has a PyTorch reference here; ONNX Runtime has it as
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.MatMulNBits
"""

import torch

from modcompile.quantization import QuantizedWeight, unpack


@torch.library.custom_op("modcompile::matmul_nbits", mutates_args=())
def matmul_nbits(
    x: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor, zero_points: torch.Tensor | None, num_bits: int
) -> torch.Tensor:
    """`linear(x, weight)` of x `[…, K]` and a weight of codes; without zero points, these are the middle code.

    Codes are uint8 `[N, G, bytes]`, scales `[N, G]`, zero points uint8 `[N, G * num_bits / 8]`, packed like codes.
    """
    rows, groups = scales.shape
    if zero_points is None:
        unpacked = torch.full((rows, groups), 2 ** (num_bits - 1), dtype=torch.uint8, device=x.device)
    else:
        unpacked = unpack(zero_points, num_bits)[:, :groups]
    weight = QuantizedWeight(unpack(packed, num_bits), scales, unpacked, num_bits).dequantize(x.shape[-1])
    return torch.nn.functional.linear(x, weight.to(x.dtype))


@matmul_nbits.register_fake
def _(
    x: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor, zero_points: torch.Tensor | None, num_bits: int
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], packed.shape[0])


MATMUL_NBITS = torch.ops.modcompile.matmul_nbits.default
