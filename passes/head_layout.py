"""The two layouts of attention heads: packed `[B, T, heads * D]`, as projections make them, and `[B, heads, T, D]`."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from modcompile.passes.graph_patterns import is_call, is_reshape, shape_of

_transpose = torch.ops.aten.transpose.int


@dataclass(frozen=True)
class SplitHeads:
    """`transposed = transpose(view(packed, [B, T, heads, D]), 1, 2)`."""

    packed: fx.Node
    view: fx.Node
    transposed: fx.Node

    def again(self, packed: fx.Node) -> fx.Node:
        """Split the heads of another tensor of the same layout, where the graph is being inserted into."""
        graph = packed.graph
        view = graph.call_function(torch.ops.aten.view.default, (packed, self.view.args[1]))
        view.meta = dict(self.view.meta)
        transposed = graph.call_function(_transpose, (view, 1, 2))
        transposed.meta = dict(self.transposed.meta)
        return transposed


def split_heads(node: Any) -> SplitHeads | None:
    """How `node` was made from packed heads, if it was."""
    if not (is_call(node, _transpose) and node.args[1:] in ((1, 2), (2, 1)) and is_reshape(view := node.args[0])):
        return None
    packed, sizes = view.args[0], shape_of(view)
    assert isinstance(packed, fx.Node)
    if len(sizes) != 4 or shape_of(packed) != (*sizes[:2], sizes[2] * sizes[3]):
        return None
    return SplitHeads(packed, view, node)


def pack_heads(x: fx.Node) -> fx.Node:
    """`[B, heads, T, D]` → `[B, T, heads * D]`, where the graph is being inserted into."""
    if (split := split_heads(x)) is not None:
        return split.packed
    transposed = x.graph.call_function(_transpose, (x, 1, 2))
    transposed.meta["val"] = x.meta["val"].transpose(1, 2)
    return _reshape(transposed, transposed.meta["val"].flatten(2))


def unpack_heads(packed: fx.Node, like: fx.Node) -> fx.Node:
    """`[B, T, heads * D]` → `[B, heads, T, D]`, the layout of another node, where the graph is being inserted into."""
    view = _reshape(packed, like.meta["val"].transpose(1, 2))
    transposed = packed.graph.call_function(_transpose, (view, 1, 2))
    transposed.meta = dict(like.meta)
    return transposed


def _reshape(x: fx.Node, like: torch.Tensor) -> fx.Node:
    """Give `x [B, T, …]` the shape of another tensor `[B, T, …]`."""
    batch, tokens = (x.graph.call_function(torch.ops.aten.sym_size.int, (x, dim)) for dim in range(2))
    reshaped = x.graph.call_function(torch.ops.aten.reshape.default, (x, [batch, tokens, *map(int, like.shape[2:])]))
    reshaped.meta["val"] = like
    return reshaped
