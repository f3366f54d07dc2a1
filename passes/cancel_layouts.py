"""Drop changes of layout that undo each other.

Before::

    y = reshape(transpose(transpose(view(x, [B, T, heads, D]), 1, 2), 1, 2), [B, T, heads * D])

After, where x is `[B, T, heads * D]`::

    y = x
"""

from typing import Any, TypeGuard

import torch
from torch import fx

from modcompile.passes.graph_patterns import is_call, is_reshape, shape_of

_transpose = torch.ops.aten.transpose.int


def cancel_layouts(graph: fx.Graph) -> int:
    """Drop them in place; return how many nodes were passed by. They are left for dead-code elimination.

    Keeps equal: every value, bit for bit.
    """
    cancelled = 0
    for node in list(graph.nodes):
        source = None
        if is_reshape(node):
            while is_reshape(inner := node.args[0]):
                node.replace_input_with(inner, inner.all_input_nodes[0])
                cancelled += 1
            if shape_of(node) and shape_of(node) == shape_of(inner):
                source = inner
        elif is_call(node, _transpose) and _is_same_transpose(inner := node.args[0], node):
            source = inner.args[0]
        if isinstance(source, fx.Node):
            node.replace_all_uses_with(source)
            cancelled += 1
    return cancelled


def _is_same_transpose(value: Any, node: fx.Node) -> TypeGuard[fx.Node]:
    return is_call(value, _transpose) and set(value.args[1:]) == set(node.args[1:])
