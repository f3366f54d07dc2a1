"""Find the products with weights in a graph: what can be computed at fewer bits."""

from dataclasses import dataclass

import torch
from torch import fx
from torch._ops import OpOverload

from modcompile.passes.graph_patterns import is_call

_aten = torch.ops.aten


@dataclass(frozen=True)
class _Product:
    """Which arguments are what, and whether the weight is [in, out] rather than [out, in]."""

    x: int
    weight: int
    bias: int | None
    is_transposed: bool


_PRODUCTS = {
    _aten.linear.default: _Product(0, 1, 2, is_transposed=False),
    _aten.addmm.default: _Product(1, 2, 0, is_transposed=True),
    _aten.mm.default: _Product(0, 1, None, is_transposed=True),
    _aten.matmul.default: _Product(0, 1, None, is_transposed=True),
}


@dataclass(frozen=True)
class LinearUse:
    """A node that multiplies by a weight of its own module."""

    node: fx.Node
    weight: fx.Node
    """The `get_attr` node of the weight."""
    x: fx.Node
    bias: fx.Node | None
    is_transposed: bool
    """Whether the weight is `[in, out]`, as in GPT-2, rather than `[out, in]`."""


def find_linears(graph: fx.Graph) -> list[LinearUse]:
    """All products of a tensor and a weight, in the order of execution."""
    found = []
    for node in graph.nodes:
        # Scaled sums, which addmm can do, are left alone.
        if not is_call(node, *_PRODUCTS) or node.kwargs:
            continue
        assert isinstance(node.target, OpOverload)
        product = _PRODUCTS[node.target]
        x, weight, bias = (_argument(node, place) for place in (product.x, product.weight, product.bias))
        if x is not None and weight is not None and weight.op == "get_attr":
            found.append(LinearUse(node, weight, x, bias, product.is_transposed))
    return found


def _argument(node: fx.Node, position: int | None) -> fx.Node | None:
    argument = node.args[position] if position is not None and position < len(node.args) else None
    return argument if isinstance(argument, fx.Node) else None
