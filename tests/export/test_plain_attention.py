from typing import Any

import pytest
import torch
from torch.nn import functional

from modcompile.export.plain_attention import plain_attention

_BATCH, _HEADS, _TOKENS, _KEYS, _SIZE = 2, 4, 3, 5, 8


def _inputs(key_heads: int = _HEADS, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    sizes = ((_HEADS, _TOKENS), (key_heads, _KEYS), (key_heads, _KEYS))
    return tuple(torch.randn(_BATCH, heads, length, _SIZE, generator=generator).to(dtype) for heads, length in sizes)


_BOOLEAN = torch.rand(_BATCH, 1, _TOKENS, _KEYS, generator=torch.Generator().manual_seed(1)) < 0.6
_BOOLEAN[..., 0] = True


@pytest.mark.parametrize(
    ("key_heads", "options"),
    [
        pytest.param(4, {}, id="plain"),
        pytest.param(4, {"attn_mask": _BOOLEAN}, id="boolean mask"),
        pytest.param(4, {"attn_mask": torch.where(_BOOLEAN, 0.5, -torch.inf)}, id="additive mask"),
        pytest.param(4, {"is_causal": True}, id="causal"),
        pytest.param(4, {"scale": 0.7}, id="scale"),
        pytest.param(2, {"enable_gqa": True, "attn_mask": _BOOLEAN}, id="grouped heads"),
    ],
)
def test_is_scaled_dot_product_attention(key_heads: int, options: dict[str, Any]) -> None:
    query, key, value = _inputs(key_heads)
    expected = functional.scaled_dot_product_attention(query, key, value, **options)
    torch.testing.assert_close(plain_attention(query, key, value, **options), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_keeps_the_dtype(dtype: torch.dtype) -> None:
    query, key, value = _inputs(dtype=dtype)
    actual = plain_attention(query, key, value, _BOOLEAN)
    assert actual.dtype == dtype
    expected = functional.scaled_dot_product_attention(query, key, value, _BOOLEAN)
    torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)


def test_a_query_that_may_attend_to_nothing_gets_the_mean_value() -> None:
    query, key, value = _inputs()
    mask = _BOOLEAN.clone()
    mask[:, :, 1] = False
    actual = plain_attention(query, key, value, mask)
    torch.testing.assert_close(actual[:, :, 1], value.mean(2))
    expected = functional.scaled_dot_product_attention(query, key, value, mask)
    torch.testing.assert_close(actual[:, :, ::2], expected[:, :, ::2])
