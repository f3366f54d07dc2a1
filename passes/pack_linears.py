"""Compute the products of one tensor with several weights as one product.

Before::

    q, k, v = linear(x, w_q), linear(x, w_k), linear(x, w_v)
    y, key, value = group_query_attention(q, k, v, …)

    gate, up = linear(x, w_gate), linear(x, w_up)

After, with the weights one above the other::

    y, key, value = group_query_attention(linear(x, w_0), None, None, …)

    gate, up = split(linear(x, w_1), [len(w_gate), len(w_up)], -1)

and likewise where weights are codes (`matmul_nbits`). One product of a token takes less time than two of half the size:
each has to wake the other threads.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from modcompile.passes.eliminate_dead_code import eliminate_dead_code
from modcompile.passes.extract_subgraph import get_attribute
from modcompile.passes.graph_patterns import is_call
from modcompile.passes.group_query_attention import GROUP_QUERY_ATTENTION
from modcompile.passes.lazy_graph_module import LazyGraphModule
from modcompile.passes.nested_graphs import map_graphs
from modcompile.passes.outlined_form import copy_graph
from modcompile.passes.quantized_ops import MATMUL_NBITS

_aten = torch.ops.aten


@dataclass(frozen=True)
class _Product:
    """A node that multiplies `x [..., K]`, its first argument, by weights that have a row for each output feature."""

    node: fx.Node
    rows: list[int]
    """The positions of its arguments that have these rows: `get_attr` nodes."""


def pack_linears(gm: fx.GraphModule) -> fx.GraphModule:
    """Return the graph, and all that it calls, with packed products; weights that are not packed are shared with `gm`.

    Keeps equal: every value, but for rounding.
    """
    stacks = _Stacks()
    return map_graphs(gm, lambda called: _pack(called, stacks))


class _Stacks:
    """Weights one above the other, each stack made once: branches may multiply by the same weights."""

    def __init__(self) -> None:
        self._made: dict[tuple[int, ...], tuple[Sequence[torch.Tensor], torch.Tensor]] = {}

    def of(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        key = tuple(map(id, tensors))
        if key not in self._made:
            self._made[key] = tensors, torch.cat([tensor.detach() for tensor in tensors])  # kept, so that ids stay
        return self._made[key][1]


def _pack(gm: fx.GraphModule, stacks: _Stacks) -> fx.GraphModule:
    graph, outputs = copy_graph(gm)
    graph.output(outputs)
    groups: dict[Any, list[_Product]] = {}
    for node in graph.nodes:
        if (product := _product(node)) is not None:
            groups.setdefault(_key(gm, product), []).append(product)
    packed: dict[str, torch.Tensor] = {}
    for group in groups.values():
        if len(group) > 1:
            _merge(gm, _in_order_of_attention(group), packed, stacks)
    eliminate_dead_code(graph)
    names = {str(node.target) for node in graph.nodes if node.op in ("get_attr", "call_module")}
    attributes = {name: packed[name] if name in packed else get_attribute(gm, name) for name in names}
    return LazyGraphModule(attributes, graph)


def _product(node: fx.Node) -> _Product | None:
    if not is_call(node, _aten.linear.default, MATMUL_NBITS) or node.kwargs:
        return None
    rows = [index for index, argument in enumerate(node.args) if index and isinstance(argument, fx.Node)]
    if all(argument.op == "get_attr" for argument in node.all_input_nodes[1:]) and rows:
        return _Product(node, rows)
    return None


def _key(gm: fx.GraphModule, product: _Product) -> tuple[Any, ...]:
    """What products have in common that can be one."""
    arguments, rows = product.node.args, product.rows
    shapes = [tuple(_attribute(gm, arguments[index]).shape[1:]) for index in rows]
    others = [argument for index, argument in enumerate(arguments) if index not in rows]
    return (product.node.target, *rows, *shapes, *others)


def _in_order_of_attention(group: list[_Product]) -> list[_Product]:
    """Queries, keys, values, where one attention takes them all."""
    call = next(iter(group[0].node.users))
    if (
        len(group) == 3
        and is_call(call, GROUP_QUERY_ATTENTION)
        and {product.node for product in group} == {*call.args[:3]}
    ):
        return sorted(group, key=lambda product: call.args.index(product.node))
    return group


def _merge(gm: fx.GraphModule, group: Sequence[_Product], packed: dict[str, torch.Tensor], stacks: _Stacks) -> None:
    position = list(group[0].node.graph.nodes).index
    first = min((product.node for product in group), key=position)
    graph, arguments = first.graph, list(group[0].node.args)
    for index in group[0].rows:
        tensors = [_attribute(gm, product.node.args[index]) for product in group]
        name = f"packed_{len(packed)}"
        packed[name] = stacks.of(tensors)
        with graph.inserting_before(first):
            arguments[index] = graph.get_attr(name)
    assert isinstance(first.target, OpOverload)
    sizes = [_attribute(gm, product.node.args[product.rows[0]]).shape[0] for product in group]
    with graph.inserting_before(first):
        merged = graph.call_function(first.target, tuple(arguments))
        if isinstance(values := first.meta.get("val"), torch.Tensor):
            merged.meta["val"] = values.new_empty(*values.shape[:-1], sum(sizes))
    attention = next(iter(group[0].node.users))
    if [product.node for product in group] == list(attention.args[:3]) and _is_all_that_reads(attention, group):
        attention.args = (merged, None, None, *attention.args[3:])
        return
    with graph.inserting_after(merged):
        split = graph.call_function(_aten.split_with_sizes.default, (merged, sizes, -1))
    for index, product in reversed(list(enumerate(group))):
        with graph.inserting_after(split):
            part = graph.call_function(operator.getitem, (split, index))
        part.meta = dict(product.node.meta)
        product.node.replace_all_uses_with(part)


def _is_all_that_reads(attention: fx.Node, group: Sequence[_Product]) -> bool:
    return is_call(attention, GROUP_QUERY_ATTENTION) and all(
        list(product.node.users) == [attention] for product in group
    )


def _attribute(gm: fx.GraphModule, node: Any) -> torch.Tensor:
    tensor = get_attribute(gm, str(node.target))
    assert isinstance(tensor, torch.Tensor)
    return tensor
