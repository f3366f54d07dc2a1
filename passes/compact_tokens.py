"""Let what a routed block does to every token by itself cost nothing for the tokens that are closed.

Before, where `block` is what `masked_block` has masked::

    y, key, value = block(hidden, …);  hidden = where(is_open, y, skip(hidden))

        block:  …  x, key, value = Attention(…);  h = hidden + linear(x, w);  y = h + mlp(norm(h))

After::

    …  x, key, value = Attention(…)
    places = open_tokens(is_open)                                         # [B, T, 1] → [M, 2]
    h, x = gather_open(hidden, places), gather_open(x, places)            # [B, T, …] → [M, …]
    h = h + linear(x, w);  y = h + mlp(norm(h))
    hidden = scatter_open(skip(hidden), places, y)

In a long prompt nearly every layer has some token that needs it, so skipping layers alone saves nothing there.

There is no switch to plain execution for calls that nearly all tokens are open in (`add_unmasked_branch` is for those
in which all are), since it would gain next to nothing:
on SmolLM2-135M at 4 bits, two cores, a gate a block, medians of 4 runs, a prompt of 512 tokens takes 808 ms with all
of them open, and 801 ms with a mask; with 30 % of the gates closed at random 659 and 805 ms. What it costs is operators
of a decode step, four more a block than in a dense graph instead of two: a token takes 9.5 ms on one thread, with masks
9.2, in a dense graph 8.7, in groups of 128, three blocks a gate (medians of 6 processes).
"""

import math
from typing import Any

import torch
from torch import fx

from modcompile.passes.extract_subgraph import get_attribute
from modcompile.passes.find_linears import find_linears
from modcompile.passes.graph_calls import append_placeholders
from modcompile.passes.graph_patterns import is_call, is_reshape
from modcompile.passes.lazy_graph_module import LazyGraphModule
from modcompile.passes.nested_graphs import map_graphs
from modcompile.passes.open_tokens import GATHER_OPEN, OPEN_TOKENS, SCATTER_OPEN
from modcompile.passes.outlined_form import inner_block
from modcompile.passes.quantized_ops import MATMUL_NBITS
from modcompile.passes.skip_path import call_skip, skip_child, skip_of
from modcompile.passes.token_wise import SPLITS, late_nodes


def compact_tokens(gm: fx.GraphModule) -> fx.GraphModule:
    """Return a lowered graph that `fuse_operators` has fused, or may yet, with every masked block compact.

    A block of which no product is token-wise stays as it is. Parameters are shared with `gm`.

    Keeps equal: every output, but for rounding.
    """
    return map_graphs(gm, lambda each: _compact(each) if _is_masked(each) else each)


def _is_masked(gm: fx.GraphModule) -> bool:
    return bool(gm.graph.find_nodes(op="call_function", target=torch.where)) and hasattr(gm, "block")


def _compact(masked: fx.GraphModule) -> fx.GraphModule:
    block = inner_block(masked)
    (output,) = block.graph.find_nodes(op="output")
    executed, *cache = output.args[0]
    late = late_nodes(block.graph, cache)
    products = {use.node for use in find_linears(block.graph)}
    if not any(node in products or is_call(node, MATMUL_NBITS) for node in late):
        return masked

    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in block.graph.nodes:
        if node.op != "output" and node not in late:
            env[node] = graph.node_copy(node, env.__getitem__)
    hidden = graph.find_nodes(op="placeholder")[0]
    (is_open,) = append_placeholders(graph, ["is_open"])
    places = graph.call_function(OPEN_TOKENS, (is_open,))
    gathered: dict[fx.Node, fx.Node] = {}

    def of_open(node: fx.Node) -> fx.Node:
        if node in late or node.op == "get_attr":
            return env[node]
        if node not in gathered:
            gathered[node] = graph.call_function(GATHER_OPEN, (env[node], places))
            gathered[node].meta = _of_rows(node)
        return gathered[node]

    for node in late:
        if is_reshape(node):
            source = node.args[0]
            assert isinstance(source, fx.Node)
            env[node] = of_open(source)
            continue
        env[node] = graph.node_copy(node, of_open)
        env[node].meta = _of_rows(node)
        if is_call(node, *SPLITS):
            env[node].args = (*env[node].args[:2], -1)
    skip = skip_of(masked)
    hidden_after = graph.call_function(SCATTER_OPEN, (call_skip(graph, hidden, skip), places, env[executed]))
    hidden_after.meta = dict(hidden.meta)
    graph.output((hidden_after, *(env[value] for value in cache)))
    graph.lint()
    held = {str(node.target) for node in graph.nodes if node.op in ("get_attr", "call_module")} - {*skip_child(skip)}
    return LazyGraphModule({name: get_attribute(block, name) for name in held} | skip_child(skip), graph)


def _of_rows(node: fx.Node) -> dict[str, Any]:
    """What is known of a node once it is computed of rows; B * T stands for how many these are."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return {}
    return {"val": value.new_empty(math.prod(value.shape[:-1]), value.shape[-1])}
