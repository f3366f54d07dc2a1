"""Spell the attention of one graph, or the append to the cache of one that skips it, as `group_query_attention`.

Before, where `cos`, `sin` and `mask` are inputs of the graph::

    q, k = RotaryEmbedding(query, cos[..., :half], sin[..., :half]), RotaryEmbedding(key, …)
    y, present_key, present_value, _ = Attention(q, k, value, mask, past_key, past_value)

or, where a block is skipped::

    present_key, present_value = cat([past_key, RotaryEmbedding(key, …)], 2), cat([past_value, value], 2)

After, where these inputs have become `cos_table`, `sin_table` and `seqlens_k`::

    y, present_key, present_value = group_query_attention(
        query, key, value, past_key, past_value, seqlens_k, total_sequence_length, cos_table, sin_table)

    _, present_key, present_value = group_query_attention(key, key, value, …, local_window_size=1)

A token that is skipped attends to itself alone, and nobody reads the result: that is the cheapest way to append it.
"""

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from modcompile.passes.fuse_attention import ATTENTION
from modcompile.passes.fuse_rotary_embedding import ROTARY_EMBEDDING
from modcompile.passes.graph_patterns import is_call, shape_of
from modcompile.passes.group_query_attention import GROUP_QUERY_ATTENTION
from modcompile.passes.head_layout import pack_heads, split_heads, unpack_heads
from modcompile.passes.outlined_form import getitems
from modcompile.passes.read_attention_inputs import NotFusedError

_aten = torch.ops.aten

TABLE = "table"
Role = int | str
"""What an input of a graph was: `TABLE`, or an attention mask, told by its window."""


@dataclass(frozen=True)
class CacheInputs:
    """The inputs of a graph that tell of its cache."""

    roles: Mapping[fx.Node, Role]
    total_sequence_length: fx.Node

    def seqlens_k(self) -> fx.Node:
        """What was the attention mask.

        Raises:
            NotFusedError: there is none, or there are several.
        """
        masks = [node for node, role in self.roles.items() if isinstance(role, int)]
        if len(masks) != 1:
            raise NotFusedError("a block takes more than one attention mask, or none")
        return masks[0]


@dataclass(frozen=True)
class _Heads:
    """Queries or keys before their rotary embedding, `[B, T, heads * D]`, and its tables."""

    packed: fx.Node
    num_heads: int
    tables: tuple[fx.Node, ...]


def fuse_cached_attention(graph: fx.Graph, inputs: CacheInputs) -> None:
    """Fuse all attention, and all appends to caches that are returned, in place.

    Keeps equal: every value, but for rounding, where padding comes last in a row.

    Raises:
        NotFusedError: there is attention, or a cache, that does not have the pattern.
    """
    for node in graph.find_nodes(op="call_function", target=ATTENTION):
        _fuse_attention(node, inputs)
    (output,) = graph.find_nodes(op="output")
    returned: Any = output.args[0]
    for key, value in zip(returned[1::2], returned[2::2], strict=False):
        if is_call(key, _aten.cat.default) and is_call(value, _aten.cat.default):
            _fuse_append(key, value, inputs)
        elif key.target is not operator.getitem or value.target is not operator.getitem:
            raise NotFusedError("a cache is not handed on as it is (blocks choose between more than two versions)")


def _fuse_attention(node: fx.Node, inputs: CacheInputs) -> None:
    query, key, value, mask, *pasts = node.args
    window = inputs.roles.get(mask) if isinstance(mask, fx.Node) else None
    if len(pasts) != 2 or None in pasts or not isinstance(window, int):
        raise NotFusedError("some attention has no cache, or another mask than the model's")
    options: dict[str, Any] = dict(node.kwargs)
    with node.graph.inserting_before(node):
        queries, keys = (
            _heads(tensor, options.get(name), inputs.roles)
            for tensor, name in ((query, "q_num_heads"), (key, "kv_num_heads"))
        )
        assert isinstance(value, fx.Node)
        values = value if len(shape_of(value)) == 3 else pack_heads(value)
        fused = _insert(queries, keys, values, pasts, inputs, window, options.get("scale"))
        for user in list(node.users):
            index = int(str(user.args[1]))
            result = fused[index]
            result.meta = dict(user.meta)
            user.replace_all_uses_with(result if len(shape_of(user)) != 4 or index else unpack_heads(result, user))
            node.graph.erase_node(user)
    node.graph.erase_node(node)


def _fuse_append(key: fx.Node, value: fx.Node, inputs: CacheInputs) -> None:
    (past_key, new_key), (past_value, new_value) = _appended(key), _appended(value)
    with key.graph.inserting_before(value if _is_before(key, value) else key):
        keys, values = _heads(new_key, None, inputs.roles), pack_heads(new_value)
        _, *presents = _insert(keys, keys, values, (past_key, past_value), inputs, 1, None)
        for old, new in zip((key, value), presents, strict=True):
            new.meta = dict(old.meta)
            old.replace_all_uses_with(new)


def _insert(
    queries: _Heads,
    keys: _Heads,
    values: fx.Node,
    pasts: Sequence[Any],
    inputs: CacheInputs,
    window: int,
    scale: float | None,
) -> list[fx.Node]:
    size = int(shape_of(pasts[0])[3])
    # What ONNX Runtime asks for; it refuses the rest when it runs.
    if size % (16 if queries.tables else 8) or shape_of(pasts[1])[3] != size:
        raise NotFusedError(f"heads of {size} features, where the operator takes multiples of 16")
    if queries.tables != keys.tables:
        raise NotFusedError("queries and keys are rotated by different tables")
    lengths = (inputs.seqlens_k(), inputs.total_sequence_length)
    call = queries.packed.graph.call_function(
        GROUP_QUERY_ATTENTION,
        (
            *(queries.packed, keys.packed, values),
            *(*pasts, *lengths),
            *(queries.tables or (None, None)),
            *(queries.num_heads, keys.num_heads, 1 / math.sqrt(size) if scale is None else scale, window),
        ),
    )
    return getitems(call, 3)


def _heads(tensor: Any, num_heads: int | None, roles: Mapping[fx.Node, Role]) -> _Heads:
    """Undo the rotation of a tensor, packed or not."""
    if num_heads is None:
        num_heads = int(shape_of(tensor)[1])
    if (split := split_heads(tensor)) is not None:
        tensor = split.packed
    tables: tuple[fx.Node, ...] = ()
    if is_call(tensor, ROTARY_EMBEDDING):
        tensor, *halves = tensor.args
        tables = tuple(_table(half, roles) for half in halves)
    return _Heads(tensor if len(shape_of(tensor)) == 3 else pack_heads(tensor), num_heads, tables)


def _table(half: Any, roles: Mapping[fx.Node, Role]) -> fx.Node:
    if is_call(half, _aten.slice.Tensor) and isinstance(table := half.args[0], fx.Node) and roles.get(table) == TABLE:
        return table
    raise NotFusedError("a rotary embedding by other tables than the model's")


def _appended(present: fx.Node) -> tuple[fx.Node, fx.Node]:
    parts, *dim = present.args
    assert isinstance(parts, list | tuple)
    if len(parts) == 2 and dim in ([2], [-2]):
        past, new = parts
        if isinstance(past, fx.Node) and past.op == "placeholder" and isinstance(new, fx.Node):
            return past, new
    raise NotFusedError("a cache that is not its past and the new tokens")


def _is_before(one: fx.Node, other: fx.Node) -> bool:
    nodes = list(one.graph.nodes)
    return nodes.index(one) < nodes.index(other)
