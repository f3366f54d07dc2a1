from typing import Any

import pytest
import torch
from torch import fx
from torch.nn.functional import scaled_dot_product_attention
from transformers.models.llama.modeling_llama import repeat_kv

from modcompile.passes.cancel_layouts import cancel_layouts
from modcompile.passes.eliminate_dead_code import eliminate_dead_code
from modcompile.passes.fuse_attention import fuse_attention
from tests.passes.traced import BATCH, PAST, TOKENS, Function, Run, calls, random, traced

_GROUPS, _SIZE, _TOTAL = 2, 8, PAST + TOKENS
_MASK = torch.rand(BATCH, 1, TOKENS, _TOTAL, generator=torch.Generator().manual_seed(5)) < 0.6
_MASK[..., 0] = True


def _inputs(heads: int, groups: int = _GROUPS) -> list[torch.Tensor]:
    """Query, new key and value, past key and value."""
    sizes = ((heads, TOKENS), (groups, TOKENS), (groups, TOKENS), (groups, PAST), (groups, PAST))
    return [random(BATCH, number, length, _SIZE, seed=seed) for seed, (number, length) in enumerate(sizes)]


def _fused(gm: fx.GraphModule) -> int:
    count = fuse_attention(gm.graph)
    cancel_layouts(gm.graph)
    eliminate_dead_code(gm.graph)
    gm.graph.lint()
    gm.recompile()
    return count


def _decode(repeats: int = 1, **options: Any) -> Function:
    def function(_: Run, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        query, key, value, past_key, past_value, *mask = inputs
        keys, values = torch.cat([past_key, key], -2), torch.cat([past_value, value], 2)
        attn_mask = mask[0] if mask else None
        output = scaled_dot_product_attention(
            query, repeat_kv(keys, repeats), repeat_kv(values, repeats), attn_mask, **options
        )
        return output, keys, values

    return function


@pytest.mark.parametrize(
    ("heads", "function", "mask"),
    [
        pytest.param(2, _decode(), [], id="a group for each head"),
        pytest.param(6, _decode(3), [], id="grouped heads"),
        pytest.param(6, _decode(enable_gqa=True), [], id="heads grouped by the operator"),
        pytest.param(6, _decode(3), [_MASK], id="boolean mask"),
        pytest.param(6, _decode(3), [torch.where(_MASK, 0.5, -torch.inf)], id="additive mask"),
        pytest.param(6, _decode(3), [_MASK.expand(-1, 6, -1, -1).clone()], id="a mask for each head"),
        pytest.param(6, _decode(3, scale=0.7), [_MASK], id="scale"),
    ],
)
def test_fuses_the_cache_and_the_groups(heads: int, function: Function, mask: list[torch.Tensor]) -> None:
    inputs = [*_inputs(heads), *mask]
    gm = traced(Run(function), *inputs)
    expected = gm(*inputs)
    assert _fused(gm) == 1
    assert _fused(gm) == 0
    assert calls(gm) == {"Attention": 1}
    torch.testing.assert_close(gm(*inputs), expected)


def test_fuses_without_a_cache() -> None:
    inputs = _inputs(6)[:3]
    gm = traced(Run(lambda _, q, k, v: scaled_dot_product_attention(q, repeat_kv(k, 3), repeat_kv(v, 3))), *inputs)
    expected = gm(*inputs)
    assert _fused(gm) == 1
    assert calls(gm) == {"Attention": 1}
    torch.testing.assert_close(gm(*inputs), expected)


def _packed(heads: int, groups: int) -> Function:
    def function(self: Run, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        query, key, value, *past = inputs
        split = [
            tensor.view(*tensor.shape[:2], -1, _SIZE).transpose(1, 2) for tensor in (query * 2, key * 2, value * 2)
        ]
        output, *present = _decode(heads // groups)(self, *split, *past)
        return output.transpose(1, 2).reshape(*query.shape[:2], -1), *present

    return function


def test_takes_heads_packed_as_projections_make_them() -> None:
    query, key, value, *past = _inputs(6)
    inputs = [*(tensor.transpose(1, 2).flatten(2) for tensor in (query, key, value)), *past]
    gm = traced(Run(_packed(6, _GROUPS)), *inputs)
    expected = gm(*inputs)
    assert _fused(gm) == 1
    assert calls(gm) == {"mul": 3, "Attention": 1}
    torch.testing.assert_close(gm(*inputs), expected)


def test_keeps_what_reads_the_cache_before_attention() -> None:
    def function(self: Run, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        query, key, value, past_key, past_value = inputs
        keys, values = torch.cat([past_key, key], 2), torch.cat([past_value, value], 2)
        return scaled_dot_product_attention(query * keys.mean(), keys, values), keys, values, keys * 2

    inputs = _inputs(2)
    gm = traced(Run(function), *inputs)
    expected = gm(*inputs)
    assert _fused(gm) == 1
    assert calls(gm)["cat"] == 1
    torch.testing.assert_close(gm(*inputs), expected)


def test_a_cache_of_three_parts_stays_outside() -> None:
    def function(_: Run, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        query, key, value, past_key, past_value = inputs
        keys, values = torch.cat([past_key, key, key], 2), torch.cat([past_value, value, value], 2)
        return scaled_dot_product_attention(query, keys, values), keys, values

    inputs = _inputs(2)
    gm = traced(Run(function), *inputs)
    expected = gm(*inputs)
    assert _fused(gm) == 1
    assert calls(gm) == {"cat": 2, "Attention": 1}
    torch.testing.assert_close(gm(*inputs), expected)


def _other_value_size(_: Run, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    query, key, value, past_key, past_value = inputs
    keys, values = torch.cat([past_key, key], 2), torch.cat([past_value, value], 2)[..., :4]
    return scaled_dot_product_attention(query, keys, values), keys, values


def _broadcast_mask(self: Run, *inputs: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
    mask = torch.ones(1, 1, 1, inputs[0].shape[2] + inputs[3].shape[2], dtype=torch.bool)
    return _decode()(self, *inputs, mask)


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(_decode(is_causal=True), id="causal"),
        pytest.param(_decode(dropout_p=0.5), id="dropout"),
        pytest.param(_other_value_size, id="values of another size"),
        pytest.param(_broadcast_mask, id="a mask for all rows"),
    ],
)
def test_skips_what_the_operator_does_not_do(function: Function) -> None:
    gm = traced(Run(function), *_inputs(2))
    assert _fused(gm) == 0
    assert calls(gm)["scaled_dot_product_attention"] == 1
