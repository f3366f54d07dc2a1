"""Spell attention out, for a runtime that has no such operator.

Before::

    y = scaled_dot_product_attention(query, key, value, mask, scale=scale)

After::

    y = softmax((scale * query) @ transpose(key) + where(mask, 0, lowest)) @ value

The exporter's own spelling flattens the heads to transpose the keys, and asks for every weight whether it is a number:
ten operators more, a copy of all keys, and nothing left for ONNX Runtime to fuse the transpose with.
"""

import math

import torch

DECOMPOSITION = torch.ops.aten.scaled_dot_product_attention.default
"""The operator that `plain_attention` takes the place of."""


def plain_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """`torch.nn.functional.scaled_dot_product_attention` for inference, in operators that ONNX has.

    Query `[…, heads, T, D]`, key and value `[…, heads, S, D]`. A query that may attend to nothing gets the mean of all
    values (there: zero). Nobody reads it, it is padding, and it costs a test of every weight in every layer.
    """
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    if is_causal:
        attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = (query * scale) @ key.transpose(-2, -1)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.where(attn_mask, 0.0, torch.finfo(query.dtype).min).to(query.dtype)
    if attn_mask is not None:
        scores = scores + attn_mask
    return torch.softmax(scores, -1) @ value
