"""One operator for attention, the update of the cache before it, and the repetition of grouped heads.

Before, with query `[B, heads, T, D]`, new key and value `[B, groups, T, D]` and past ones `[B, groups, P, D]`::

    present_key, present_value = cat([past_key, key], 2), cat([past_value, value], 2)
    y = scaled_dot_product_attention(query, repeat(present_key), repeat(present_value), mask, scale)

    repeat(x) = reshape(expand(unsqueeze(x, 2), [B, groups, heads / groups, P + T, D]), [B, heads, P + T, D])

After::

    y, present_key, present_value, _ = Attention(query, key, value, mask, past_key, past_value, scale)

and where all three are heads of projections `[B, T, heads * D]`, on those, with y of the same layout.

https://onnx.ai/onnx/operators/onnx__Attention.html; PyTorch has it as `torch.onnx.ops.attention`.
"""

import operator
from typing import Any

import torch
import torch.onnx.ops  # registers the operators
from torch import fx

from modcompile.passes.graph_patterns import is_call, is_reshape, shape_of
from modcompile.passes.head_layout import split_heads

_aten = torch.ops.aten
_sdpa = _aten.scaled_dot_product_attention.default
_PARAMETERS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
ATTENTION = torch.ops.onnx.Attention.opset23


def fuse_attention(graph: fx.Graph) -> int:
    """Fuse them in place; return how many.

    Keeps equal: every value, but for rounding.
    """
    return sum(_fuse(graph, node) for node in graph.find_nodes(op="call_function", target=_sdpa))


def _fuse(graph: fx.Graph, node: fx.Node) -> bool:
    given: dict[str, Any] = dict(zip(_PARAMETERS, node.args, strict=False)) | dict(node.kwargs)
    query, mask = given["query"], given.get("attn_mask")
    present = [_before_repeat(given[name]) for name in ("key", "value")]
    if given.get("dropout_p") or given.get("is_causal") or not _fits(query, present, mask):
        return False
    updates = [_cache_update(tensor) for tensor in present]
    is_update = all(update is not None for update in updates)
    past = [update[0] for update in updates if update] if is_update else [None, None]
    new = [update[1] for update in updates if update] if is_update else present

    options: dict[str, Any] = {"scale": given["scale"]} if given.get("scale") is not None else {}
    splits = [split for tensor in (query, *new) if (split := split_heads(tensor)) is not None]
    packed = len(splits) == 3
    inputs = [split.packed for split in splits] if packed else [query, *new]
    if packed:
        options |= {"q_num_heads": shape_of(query)[1], "kv_num_heads": shape_of(new[0])[1]}
    with graph.inserting_before(node):
        fused = graph.call_function(ATTENTION, (*inputs, mask, *past), options)
        output, *presents = [graph.call_function(operator.getitem, (fused, index)) for index in range(3)]
        output.meta = dict(inputs[0].meta)
        result = splits[0].again(output) if packed else output
    if is_update:
        for tensor, value in zip(present, presents, strict=True):
            value.meta = dict(tensor.meta)
            _replace_later_uses(tensor, value)
    node.replace_all_uses_with(result)
    graph.erase_node(node)
    return True


def _before_repeat(value: fx.Node) -> fx.Node:
    """Keys or values before each of their heads was repeated for the queries of its group."""
    if is_reshape(value) and is_call(expand := value.args[0], _aten.expand.default):
        unsqueezed = expand.args[0]
        if is_call(unsqueezed, _aten.unsqueeze.default) and unsqueezed.args[1] == 2:
            source = unsqueezed.args[0]
            assert isinstance(source, fx.Node)
            batch, groups, tokens, size = shape_of(source)
            repeats = shape_of(expand)[2]
            if shape_of(expand) == (batch, groups, repeats, tokens, size) and shape_of(value) == (
                batch,
                groups * repeats,
                tokens,
                size,
            ):
                return source
    return value


def _fits(query: fx.Node, present: list[fx.Node], mask: Any) -> bool:
    """Whether the operator takes these shapes: one head size, and a mask without broadcasting but over heads."""
    shapes = [shape_of(tensor) for tensor in (query, *present)]
    if any(len(shape) != 4 for shape in shapes) or shapes[1] != shapes[2]:
        return False
    (batch, heads, tokens, size), (_, groups, total, key_size), _ = shapes
    if size != key_size or heads % groups:
        return False
    return mask is None or shape_of(mask) in ((batch, 1, tokens, total), (batch, heads, tokens, total))


def _cache_update(present: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """Past and new keys, or values, if `present` is the two of them."""
    if not is_call(present, _aten.cat.default):
        return None
    parts, *dim = present.args
    assert isinstance(parts, list | tuple)
    if len(parts) != 2 or dim not in ([2], [-2]):
        return None
    past, new = parts
    assert isinstance(past, fx.Node)
    assert isinstance(new, fx.Node)
    return past, new


def _replace_later_uses(node: fx.Node, replacement: fx.Node) -> None:
    """Where `node` is used after `replacement` was made; what is used before stays."""
    later = False
    for other in node.graph.nodes:
        if later and node in other.all_input_nodes:
            other.replace_input_with(node, replacement)
        later = later or other is replacement
