"""Tell which values consist of two equal halves, along their last dimension.

Rotary embeddings make their tables so (`cos(cat([angles, angles], -1))`), and operators for rotary embedding take one
half: whether they may be used is told from the graph, not from a model's name.
"""

from collections.abc import Container
from typing import Any

import torch
from torch import fx

from modcompile.passes.graph_patterns import is_call, shape_of

_aten = torch.ops.aten
_OF_EVERY_ELEMENT = {_aten.cos.default, _aten.sin.default, _aten.to.dtype}
_WITH_A_NUMBER = {_aten.mul.Tensor, _aten.add.Tensor}


def has_equal_halves(node: fx.Node, known: Container[Any]) -> bool:
    """Whether a node has equal halves, given which of its arguments have; False where it can't be told."""
    if is_call(node, _aten.cat.default):
        parts, *dim = node.args
        assert isinstance(parts, list | tuple)
        last = dim in ([-1], [len(shape_of(node)) - 1])
        return last and len(parts) == 2 and parts[0] is parts[1]
    if node.op != "call_function" or not node.args or node.args[0] not in known:
        return False
    return node.target in _OF_EVERY_ELEMENT or (
        node.target in _WITH_A_NUMBER and isinstance(node.args[1], int | float) and not node.kwargs
    )
