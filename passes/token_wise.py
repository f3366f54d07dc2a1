"""Which nodes of a block treat every token by itself, so that they can be computed of some tokens only."""

import math
from collections.abc import Collection
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from modcompile.passes.find_linears import find_linears
from modcompile.passes.graph_patterns import is_call, is_reshape, shape_of
from modcompile.passes.quantized_ops import MATMUL_NBITS

_aten = torch.ops.aten
_NORMS = (_aten.rms_norm.default, _aten.layer_norm.default)
SPLITS = (_aten.split.Tensor, _aten.split_with_sizes.default, _aten.chunk.default)
_LAST = (-1, 2)


def late_nodes(graph: fx.Graph, kept: Collection[fx.Node]) -> list[fx.Node]:
    """The nodes that no value of `kept` needs and that are token-wise, in order; what reads one of them is one itself.

    `graph` is that of a block, its first input the hidden state `[B, T, H]`. What they read from other nodes is
    `[B, T, …]`, or belongs to the module.
    """
    hidden = graph.find_nodes(op="placeholder")[0]
    tokens = shape_of(hidden)[:2]
    products = {use.node for use in find_linears(graph)}
    body = [node for node in graph.nodes if node.op not in ("placeholder", "get_attr", "output")]
    of_all = _needed(kept)
    while True:
        late = {node: None for node in body if node not in of_all}
        others = [node for node in late if not _is_token_wise(node, late, tokens, products)]
        if not others:
            return list(late)
        of_all |= _needed(others)


def _needed(nodes: Collection[fx.Node]) -> set[fx.Node]:
    """The nodes, and what they are computed from."""
    found: set[fx.Node] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting.extend(node.all_input_nodes)
    return found


def _is_token_wise(
    node: fx.Node, late: Collection[fx.Node], tokens: tuple[Any, ...], products: Collection[fx.Node]
) -> bool:
    own = [value for value in node.all_input_nodes if value.op == "get_attr"]
    read = [value for value in node.all_input_nodes if value not in own]
    if is_reshape(node):  # the others that it reads are sizes
        x = node.args[0]
        is_of_tokens = isinstance(x, fx.Node) and (x in late or _is_of_tokens(x, tokens))
        *sizes, features = shape_of(node)
        return is_of_tokens and math.prod(sizes) == math.prod(tokens) and features == shape_of(x)[-1]
    if not read or not all(value in late or _is_of_tokens(value, tokens) for value in read):
        return False
    if node in products or is_call(node, MATMUL_NBITS):
        return len(read) == 1
    if is_call(node, *_NORMS):
        return len(read) == 1 and isinstance(node.args[1], list) and len(node.args[1]) == 1
    if is_call(node, *SPLITS):
        return len(node.args) == 3 and node.args[2] in _LAST
    if is_call(node, _aten.mean.dim):
        return node.args[1:] == ([-1], True)
    if is_call(node, _aten.dropout.default):
        return node.args[2] is False
    if isinstance(node.target, OpOverload):
        return torch.Tag.pointwise in node.target.tags and all(len(shape_of(value)) == 1 for value in own)
    return node.op == "call_function" and is_call(read[0], *SPLITS) and read[0] in late


def _is_of_tokens(value: fx.Node, tokens: tuple[Any, ...]) -> bool:
    return len(shape_of(value)) == 3 and shape_of(value)[:2] == tokens
