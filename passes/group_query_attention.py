"""Attention over a cache of keys and values, with the append to the cache and the rotary embedding in it.

It has a PyTorch reference here; ONNX Runtime has it as
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.GroupQueryAttention
"""

import torch
from torch.nn import functional


@torch.library.custom_op("modcompile::group_query_attention", mutates_args=())
def group_query_attention(
    query: torch.Tensor,
    key: torch.Tensor | None,
    value: torch.Tensor | None,
    past_key: torch.Tensor,
    past_value: torch.Tensor,
    seqlens_k: torch.Tensor,
    total_sequence_length: torch.Tensor,
    cos_cache: torch.Tensor | None,
    sin_cache: torch.Tensor | None,
    num_heads: int,
    kv_num_heads: int,
    scale: float,
    local_window_size: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Causal attention of T new tokens to P cached ones and to themselves: `[B, T, num_heads * D]`, and the cache.

    `query` is `[B, T, num_heads * D]`, `key` and `value` are `[B, T, kv_num_heads * D]`; or `query` holds all three,
    one behind the other, and they are None. Past keys and values are `[B, kv_num_heads, P, D]`, present ones are
    `[B, kv_num_heads, P + T, D]`. `seqlens_k [B]` (int32) is how many tokens a row then has in its cache, less one: its
    past ones lie in the first slots, its new ones follow them at once, and the rest is undefined (here 0).
    `total_sequence_length` (int32, a scalar) is P + T. With `cos_cache` and `sin_cache` `[max positions, R / 2]` the
    first R of the D features of queries and keys are rotated, by halves, for the slot that the token takes. A query
    sees the last `local_window_size` tokens, itself included, or all if that is -1.
    """
    batch, tokens, _ = query.shape
    size = past_key.shape[3]
    if key is None or value is None:
        sizes = [num_heads * size, kv_num_heads * size, kv_num_heads * size]
        query, key, value = query.split(sizes, dim=-1)
    queries, keys, values = (
        packed.view(batch, tokens, heads, size).transpose(1, 2)
        for packed, heads in ((query, num_heads), (key, kv_num_heads), (value, kv_num_heads))
    )
    total = seqlens_k.long() + 1
    slots = (total - tokens).unsqueeze(1) + torch.arange(tokens, device=query.device)
    if cos_cache is not None and sin_cache is not None:
        queries, keys = (rotate(x, cos_cache[slots], sin_cache[slots]) for x in (queries, keys))
    present_key, present_value = (_append(past, new, slots) for past, new in ((past_key, keys), (past_value, values)))
    columns = torch.arange(present_key.shape[2], device=query.device)
    seen = columns <= slots.unsqueeze(-1)
    if local_window_size > 0:
        seen &= columns > slots.unsqueeze(-1) - local_window_size
    output = functional.scaled_dot_product_attention(
        queries, present_key, present_value, attn_mask=seen.unsqueeze(1), scale=scale, enable_gqa=True
    )
    return output.transpose(1, 2).reshape(batch, tokens, num_heads * size), present_key, present_value


@group_query_attention.register_fake
def _(
    query: torch.Tensor,
    key: torch.Tensor | None,
    value: torch.Tensor | None,
    past_key: torch.Tensor,
    past_value: torch.Tensor,
    seqlens_k: torch.Tensor,
    total_sequence_length: torch.Tensor,
    cos_cache: torch.Tensor | None,
    sin_cache: torch.Tensor | None,
    num_heads: int,
    kv_num_heads: int,
    scale: float,
    local_window_size: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, tokens, _ = query.shape
    _, heads, past, size = past_key.shape
    presents = [past_key.new_empty(batch, heads, past + tokens, size) for _ in range(2)]
    return query.new_empty(batch, tokens, num_heads * size), presents[0], presents[1]


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the first R features of x `[B, heads, T, D]` by halves; cos and sin are `[B, T, R / 2]`."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)


def _append(past: torch.Tensor, new: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """`[B, heads, P + T, D]`: the new ones at `slots [B, T]`, what lies behind them 0."""
    present = torch.cat([past, torch.zeros_like(new)], 2)
    index = slots[:, None, :, None].expand(new.shape)
    behind = torch.arange(present.shape[2], device=past.device) > slots[:, -1:]
    return present.masked_fill(behind[:, None, :, None], 0).scatter(2, index, new)


GROUP_QUERY_ATTENTION = torch.ops.modcompile.group_query_attention.default
