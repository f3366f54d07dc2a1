import pytest
import torch
from torch import fx
from torch.nn.functional import scaled_dot_product_attention
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from modcompile.passes.cached_attention import TABLE, CacheInputs, Role, fuse_cached_attention
from modcompile.passes.cancel_layouts import cancel_layouts
from modcompile.passes.eliminate_dead_code import eliminate_dead_code
from modcompile.passes.fuse_attention import fuse_attention
from modcompile.passes.fuse_rotary_embedding import fuse_rotary_embedding
from modcompile.passes.graph_calls import append_placeholders
from modcompile.passes.read_attention_inputs import NotFusedError
from tests.passes.traced import BATCH, PAST, TOKENS, Function, Run, calls, random, traced

_HEADS, _SIZE = 2, 16
_ANGLES = random(PAST + TOKENS, _SIZE // 2, seed=9)
_NEW = tuple(random(BATCH, TOKENS, _HEADS * _SIZE, seed=seed) for seed in range(3))
_PAST = tuple(random(BATCH, _HEADS, PAST, _SIZE, seed=seed) for seed in (3, 4))
_ROLES: dict[str, Role] = {"mask": 4, "cos": TABLE, "sin": TABLE}
_MASK = (torch.ones(PAST + TOKENS, PAST + TOKENS).tril() - torch.ones(PAST + TOKENS, PAST + TOKENS).tril(-4)).bool()


def _tables(angles: torch.Tensor) -> list[torch.Tensor]:
    both = torch.cat([angles, angles], -1)
    return [table[PAST:].expand(BATCH, TOKENS, _SIZE).clone() for table in (both.cos(), both.sin())]


_BEFORE = (*_NEW, *_PAST, _MASK[PAST:].expand(BATCH, 1, TOKENS, PAST + TOKENS).clone(), *_tables(_ANGLES))
"""Queries, keys and values of the new tokens, past keys and values, mask, cos and sin."""
_AFTER = (
    *(*_NEW, *_PAST, torch.full((BATCH,), PAST + TOKENS - 1, dtype=torch.int32), _ANGLES.cos(), _ANGLES.sin()),
    torch.tensor(PAST + TOKENS, dtype=torch.int32),
)
"""The same, but for lengths and tables of all positions; and the total length."""


def _heads(packed: torch.Tensor) -> torch.Tensor:
    return packed.view(packed.shape[0], packed.shape[1], _HEADS, _SIZE).transpose(1, 2)


def _attend(_: Run, *given: torch.Tensor) -> tuple[torch.Tensor, ...]:
    query, key, value, past_key, past_value, mask, cos, sin = given
    queries, keys = apply_rotary_pos_emb(_heads(query), _heads(key), cos, sin)
    keys, values = torch.cat([past_key, keys], 2), torch.cat([past_value, _heads(value)], 2)
    attended = scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=0.3)
    return attended.transpose(1, 2).reshape(query.shape), keys, values


def _without_rotation(_: Run, *given: torch.Tensor) -> tuple[torch.Tensor, ...]:
    query, key, value, past_key, past_value, mask, *_tables = given
    keys, values = torch.cat([past_key, _heads(key)], 2), torch.cat([past_value, _heads(value)], 2)
    attended = scaled_dot_product_attention(_heads(query), keys, values, attn_mask=mask)
    return attended.transpose(1, 2).reshape(query.shape), keys, values


def _skip(_: Run, *given: torch.Tensor) -> tuple[torch.Tensor, ...]:
    query, key, value, past_key, past_value, _mask, cos, sin = given
    _, keys = apply_rotary_pos_emb(_heads(query), _heads(key), cos, sin)
    return query, torch.cat([past_key, keys], 2), torch.cat([past_value, _heads(value)], -2)


def _fuse(function: Function, roles: dict[str, Role] = _ROLES) -> fx.GraphModule:
    gm = traced(Run(function), *_BEFORE)
    names = ("query", "key", "value", "past_key", "past_value", "mask", "cos", "sin")
    inputs = dict(zip(names, gm.graph.find_nodes(op="placeholder"), strict=True))
    fuse_rotary_embedding(gm.graph, {inputs["cos"], inputs["sin"]})
    fuse_attention(gm.graph)
    cancel_layouts(gm.graph)
    eliminate_dead_code(gm.graph)
    (total,) = append_placeholders(gm.graph, ["total_sequence_length"])
    fuse_cached_attention(gm.graph, CacheInputs({inputs[name]: role for name, role in roles.items()}, total))
    cancel_layouts(gm.graph)
    eliminate_dead_code(gm.graph)
    gm.graph.lint()
    gm.recompile()
    return gm


@pytest.mark.parametrize("function", [_attend, _without_rotation, _skip])
def test_computes_the_same_from_lengths_and_tables(function: Function) -> None:
    gm = _fuse(function)
    operators = calls(gm)
    assert operators["group_query_attention"] == 1
    assert not {"cat", "Attention", "RotaryEmbedding", "transpose", "slice"} & operators.keys()
    torch.testing.assert_close(gm(*_AFTER), function(Run(function), *_BEFORE))


def _other_tables_for_keys(_: Run, *given: torch.Tensor) -> tuple[torch.Tensor, ...]:
    query, key, value, past_key, past_value, mask, cos, sin = given
    queries, _keys = apply_rotary_pos_emb(_heads(query), _heads(key), cos, sin)
    _queries, rotated = apply_rotary_pos_emb(_heads(query), _heads(key), sin, cos)
    keys, values = torch.cat([past_key, rotated], 2), torch.cat([past_value, _heads(value)], 2)
    attended = scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
    return attended.transpose(1, 2).reshape(query.shape), keys, values


def _own_mask(run: Run, *given: torch.Tensor) -> tuple[torch.Tensor, ...]:
    query, key, value, past_key, past_value, mask, cos, sin = given
    return _attend(run, query, key, value, past_key, past_value, ~mask, cos, sin)


def _new_tokens_first(_: Run, *given: torch.Tensor) -> tuple[torch.Tensor, ...]:
    query, key, value, past_key, past_value, *_shared = given
    return query, torch.cat([_heads(key), past_key], 2), torch.cat([_heads(value), past_value], 2)


def _scaled_cache(run: Run, *given: torch.Tensor) -> tuple[torch.Tensor, ...]:
    output, keys, values = _attend(run, *given)
    return output, keys * 2, values * 2


@pytest.mark.parametrize(
    ("function", "roles", "reason"),
    [
        (_attend, {"mask": 4}, "a rotary embedding by other tables than the model's"),
        (_other_tables_for_keys, _ROLES, "queries and keys are rotated by different tables"),
        (_own_mask, _ROLES, "some attention has no cache, or another mask than the model's"),
        (_attend, {"cos": TABLE, "sin": TABLE}, "some attention has no cache, or another mask than the model's"),
        (_attend, _ROLES | {"query": -1}, "a block takes more than one attention mask, or none"),
        (_skip, {"cos": TABLE, "sin": TABLE}, "a block takes more than one attention mask, or none"),
        (_new_tokens_first, _ROLES, "a cache that is not its past and the new tokens"),
        (_scaled_cache, _ROLES, "a cache is not handed on as it is"),
    ],
)
def test_says_what_it_does_not_know(function: Function, roles: dict[str, Role], reason: str) -> None:
    with pytest.raises(NotFusedError, match=f"^{reason}"):
        _fuse(function, roles)
