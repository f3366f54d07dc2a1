"""Take the open tokens of a call out of it, and put them back.

Operators of their own, because the number of open tokens is known only once they are counted, and because `torch.onnx`
would spell each in many nodes.
"""

import torch


@torch.library.custom_op("modcompile::open_tokens", mutates_args=())
def open_tokens(is_open: torch.Tensor) -> torch.Tensor:
    """`is_open [B, T, 1]` (bool) → row and place of each open token, int64 `[M, 2]`."""
    return is_open.squeeze(2).nonzero().contiguous()


@open_tokens.register_fake
def _(is_open: torch.Tensor) -> torch.Tensor:
    count = torch.library.get_ctx().new_dynamic_size()
    return is_open.new_empty(count, 2, dtype=torch.int64)


@torch.library.custom_op("modcompile::gather_open", mutates_args=())
def gather_open(x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """`x [B, T, H]`, `places [M, 2]` → `[M, H]`."""
    return x[places[:, 0], places[:, 1]]


@gather_open.register_fake
def _(x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    return x.new_empty(places.shape[0], x.shape[2])


@torch.library.custom_op("modcompile::scatter_open", mutates_args=())
def scatter_open(x: torch.Tensor, places: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """`x [B, T, H]` with `values [M, H]` at `places [M, 2]`."""
    return x.index_put((places[:, 0], places[:, 1]), values)


@scatter_open.register_fake
def _(x: torch.Tensor, places: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


OPEN_TOKENS = torch.ops.modcompile.open_tokens.default
GATHER_OPEN = torch.ops.modcompile.gather_open.default
SCATTER_OPEN = torch.ops.modcompile.scatter_open.default
