"""The form of a graph between the passes, and how to read it.

A graph in *outlined form* has the placeholders `input_ids`, `attention_mask`, `position_ids` and, traced with a cache,
a past key and value for each layer. It calls `prologue`, then `blocks.0`, `blocks.1`, …, then `epilogue`, and returns
the logits, the present keys and values, and for each gate its values or its routing mask.

A block is called with the hidden state `[B, T, H]` first, then what all blocks share (rotary embedding, attention
mask), then its own past key and value `[B, heads, P, D]`; it returns the new hidden state first, and the present key
and value `[B, heads, P + T, D]` after it. A routed block returns its gate `[B, T, 1]` or routing mask `[B, T, 1]` last;
it has the child `router` while it is soft, the child `decide`, which holds the router, once it is hard, and
`then_branch` once it is lowered.

Consecutive blocks that share a gate are called as one, `blocks.2-4`, with the past keys and values of all, and return
the present ones of all. What is said of a block holds for such a *group* too. A group does nothing by itself: it calls
its members, `0`, `1`, …
"""

import operator
from typing import Any

from torch import fx, nn

from modcompile.layer_ranges import layers_of

NUM_TOKEN_INPUTS = 3
"""input_ids, attention_mask, position_ids: what a graph takes before the cache."""

_ROUTED = {"router", "decide", "then_branch"}


def block_calls(graph: fx.Graph) -> list[fx.Node]:
    """The calls of the decoder blocks, in the order of execution."""
    return [node for node in graph.find_nodes(op="call_module") if str(node.target).startswith("blocks.")]


def routed_calls(gm: fx.GraphModule, graph: fx.Graph | None = None) -> list[fx.Node]:
    """The calls of the routed blocks of `gm`, in the order of execution, as nodes of `graph` (by default its own)."""
    calls = block_calls(graph or gm.graph)
    return [call for call in calls if _ROUTED & dict(gm.get_submodule(str(call.target)).named_children()).keys()]


def lowered_calls(gm: fx.GraphModule, graph: fx.Graph | None = None) -> list[fx.Node]:
    """Those of them that `lower_gates` has lowered; not blocks of several precisions, which decide on more."""
    return [call for call in routed_calls(gm, graph) if hasattr(gm.get_submodule(str(call.target)), "then_branch")]


def layers_called(call: fx.Node) -> range:
    """The layers whose blocks a call of `block_calls` executes: one, or those of a group."""
    return layers_of(str(call.target).removeprefix("blocks."))


def gated_layers(gm: fx.GraphModule) -> list[range]:
    """For each gate, in order, the layers whose blocks it executes or skips together."""
    return [layers_called(call) for call in routed_calls(gm)]


def is_group(module: nn.Module) -> bool:
    """Whether all that a module does is to call the numbered members of a group."""
    if not isinstance(module, fx.GraphModule):
        return False
    doing = [node for node in module.graph.nodes if node.op not in ("placeholder", "output")]
    return all(
        (node.op == "call_module" and str(node.target).isdecimal()) or node.target is operator.getitem for node in doing
    )


def inner_block(module: fx.GraphModule) -> fx.GraphModule:
    """The block in a `mixed_block` or `masked_block`."""
    block = module.get_submodule("block")
    assert isinstance(block, fx.GraphModule)
    return block


def results(call: fx.Node) -> list[fx.Node]:
    """The values that a call returns, in order (each exists once as a `getitem`)."""
    return sorted(call.users, key=lambda user: int(str(user.args[1])))


def getitems(call: fx.Node, count: int) -> list[fx.Node]:
    """The same of a new call, made here."""
    return [call.graph.call_function(operator.getitem, (call, index)) for index in range(count)]


def num_outputs(gm: fx.GraphModule) -> int:
    """How many values a graph returns."""
    (output,) = gm.graph.find_nodes(op="output")
    return len(output.args[0])


def called_modules(gm: fx.GraphModule) -> dict[str, nn.Module]:
    """The modules that the graph calls, by name."""
    return {str(node.target): gm.get_submodule(str(node.target)) for node in gm.graph.find_nodes(op="call_module")}


def copy_graph(gm: fx.GraphModule) -> tuple[fx.Graph, tuple[fx.Node, ...]]:
    """A copy of the graph that has no output yet, and the nodes that were returned."""
    graph = fx.Graph()
    outputs: Any = graph.graph_copy(gm.graph, {})
    return graph, outputs
