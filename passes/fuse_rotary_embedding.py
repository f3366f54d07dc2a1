"""One operator for a rotary embedding.

Before, with `half = D / 2`, x `[B, heads, T, D]`, cos and sin `[B, T, D]`::

    y = x * unsqueeze(cos, 1) + cat([-x[..., half:], x[..., :half]], -1) * unsqueeze(sin, 1)

After::

    y = RotaryEmbedding(x, cos[..., :half], sin[..., :half])

or, where x is the heads of a projection p `[B, T, heads * D]`::

    y = transpose(view(RotaryEmbedding(p, cos[..., :half], sin[..., :half], num_heads), [B, T, heads, D]), 1, 2)

https://onnx.ai/onnx/operators/onnx__RotaryEmbedding.html; PyTorch has it as `torch.onnx.ops.rotary_embedding`.
"""

from collections.abc import Container
from typing import Any

import torch
import torch.onnx.ops  # registers the operators
from torch import fx

from modcompile.passes.graph_patterns import either_order, is_call, shape_of
from modcompile.passes.head_layout import split_heads

_aten = torch.ops.aten
ROTARY_EMBEDDING = torch.ops.onnx.RotaryEmbedding.opset23


def fuse_rotary_embedding(graph: fx.Graph, equal_halves: Container[fx.Node]) -> int:
    """Fuse them in place; return how many. Only tables that are known to have equal halves are halved.

    Keeps equal: every value, but for rounding.
    """
    fused = 0
    for node in graph.find_nodes(op="call_function", target=_aten.add.Tensor):
        matched = _rotation(node)
        if matched is None or not all(table in equal_halves for table in matched[1:]):
            continue
        x, *tables = matched
        batch, heads, tokens, size = shape_of(x)
        if any(shape_of(table) != (batch, tokens, size) for table in tables):
            continue
        with graph.inserting_before(node):
            halves = [graph.call_function(_aten.slice.Tensor, (table, 2, 0, size // 2)) for table in tables]
            if (split := split_heads(x)) is None:
                rotated = graph.call_function(ROTARY_EMBEDDING, (x, *halves))
            else:
                options = {"num_heads": heads}
                packed = graph.call_function(ROTARY_EMBEDDING, (split.packed, *halves), options)
                packed.meta = dict(split.packed.meta)
                rotated = split.again(packed)
        rotated.meta = dict(node.meta)
        node.replace_all_uses_with(rotated)
        graph.erase_node(node)
        fused += 1
    return fused


def _rotation(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """x, cos and sin of a rotation."""
    if node.kwargs:
        return None
    for straight, turned in either_order(node):
        if not (is_call(straight, _aten.mul.Tensor) and is_call(turned, _aten.mul.Tensor)):
            continue
        for x, cos in either_order(straight):
            for half_turned, sin in either_order(turned):
                tables = _without_heads(cos), _without_heads(sin)
                if _is_half_turned(half_turned, x) and tables[0] is not None and tables[1] is not None:
                    return x, tables[0], tables[1]
    return None


def _is_half_turned(value: Any, x: Any) -> bool:
    """Whether `value` is `cat([-x[..., half:], x[..., :half]], -1)`."""
    if not (is_call(value, _aten.cat.default) and len(shape_of(x)) == 4):
        return False
    parts, *dim = value.args
    assert isinstance(parts, list | tuple)
    if len(parts) != 2 or dim not in ([-1], [3]) or not is_call(parts[0], _aten.neg.default):
        return False
    size = shape_of(x)[3]
    return _is_slice(parts[0].args[0], x, size // 2, size) and _is_slice(parts[1], x, 0, size // 2)


def _is_slice(value: Any, x: fx.Node, start: int, stop: int) -> bool:
    if not (is_call(value, _aten.slice.Tensor) and value.args[0] is x and not value.kwargs):
        return False
    dim, first, last, *step = value.args[1:]
    assert isinstance(last, int)
    bounds = first, min(last, int(shape_of(x)[3]))
    return dim in (-1, 3) and bounds == (start, stop) and step in ([], [1])


def _without_heads(value: Any) -> fx.Node | None:
    """The table `[B, T, D]` of an `unsqueeze(table, 1)`."""
    if is_call(value, _aten.unsqueeze.default) and value.args[1] == 1 and isinstance(value.args[0], fx.Node):
        return value.args[0]
    return None
