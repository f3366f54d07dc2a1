"""Take tokens of each row by their index, an operator that `torch.onnx` spells in many nodes, and ONNX in one."""

import torch


@torch.library.custom_op("modcompile::gather_tokens", mutates_args=())
def gather_tokens(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """`x [B, S, …]`, `index [B, T]` (int64) → `[B, T, …]`: token `index[b, t]` of row b."""
    rows = torch.arange(x.shape[0], device=x.device).unsqueeze(1)
    return x[rows, index]


@gather_tokens.register_fake
def _(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return x.new_empty(*index.shape, *x.shape[2:])


GATHER_TOKENS = torch.ops.modcompile.gather_tokens.default
