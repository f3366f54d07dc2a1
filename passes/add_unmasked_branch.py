"""Execute a block without its masks where every token of the call is open.

Before, in a lowered block::

    open, routing_mask, needed = decide(router_input, least_score, token_mask)
    hidden, key, value = cond(needed, then_branch, else_branch, [hidden, …, open])

After::

    open, routing_mask, all_open = decide(router_input, least_score, token_mask)
    hidden, key, value = cond(all_open, then_branch, else_branch, [hidden, …, open])

    then_branch:  hidden, key, value = block(hidden, …)                    # what was masked, or a group of these
    else_branch:  needed = any(open);  cond(needed, then_branch, else_branch, [hidden, …, open])         # as before

A decode step of one row has one token: where a block is executed, all tokens are open, and neither masks nor adapters
have work to do.
"""

import torch
from torch import fx, nn

from modcompile.passes.add_unused_inputs import add_unused_inputs
from modcompile.passes.eliminate_dead_code import eliminate_dead_code
from modcompile.passes.extract_subgraph import get_attribute
from modcompile.passes.lazy_graph_module import LazyGraphModule
from modcompile.passes.map_blocks import map_blocks
from modcompile.passes.outlined_form import (
    called_modules,
    copy_graph,
    getitems,
    inner_block,
    lowered_calls,
    num_outputs,
)

_cond = torch.ops.higher_order.cond


def add_unmasked_branch(gm: fx.GraphModule) -> fx.GraphModule:
    """Return the graph of `lower_gates` with such a branch in every routed block; what is called is shared with `gm`.

    Keeps equal: every output, bit for bit.
    """
    graph, outputs = copy_graph(gm)
    graph.output(outputs)
    modules: dict[str, nn.Module | torch.Tensor] = dict(called_modules(gm))
    modules |= {str(node.target): get_attribute(gm, str(node.target)) for node in graph.find_nodes(op="get_attr")}
    for call in lowered_calls(gm, graph):
        block = gm.get_submodule(str(call.target))
        assert isinstance(block, fx.GraphModule)
        modules[str(call.target)] = _add_branch(block)
    return LazyGraphModule(modules, graph)


def _add_branch(lowered: fx.GraphModule) -> fx.GraphModule:
    decide, masked = (lowered.get_submodule(name) for name in ("decide", "then_branch"))
    assert isinstance(decide, fx.GraphModule)
    assert isinstance(masked, fx.GraphModule)
    children = {
        "decide": _whether_all_are_open(decide),
        "then_branch": map_blocks(masked, _without_mask),
        "else_branch": _masked_or_skipped(lowered, masked),
    }
    return LazyGraphModule(children, lowered.graph)


def _without_mask(masked: fx.GraphModule) -> fx.GraphModule:
    return add_unused_inputs(inner_block(masked), ["is_open"])


def _whether_all_are_open(decide: fx.GraphModule) -> fx.GraphModule:
    """What a decision tells last is the condition of its block's `cond`."""
    graph, (is_open, routing_mask, _) = copy_graph(decide)
    graph.output((is_open, routing_mask, graph.call_function(torch.all, (is_open,))))
    eliminate_dead_code(graph)
    return LazyGraphModule(dict(decide.named_children()), graph)


def _masked_or_skipped(lowered: fx.GraphModule, masked: fx.GraphModule) -> fx.GraphModule:
    graph = fx.Graph()
    operands = [graph.placeholder(node.name) for node in masked.graph.find_nodes(op="placeholder")]
    (needed,) = getitems(graph.call_module("is_needed", (operands[-1],)), 1)
    branches = {name: graph.get_attr(name) for name in ("then_branch", "else_branch")}
    values = graph.call_function(_cond, (needed, *branches.values(), tuple(operands)))
    graph.output(tuple(getitems(values, num_outputs(masked))))
    return LazyGraphModule({"is_needed": _any(), **{name: lowered.get_submodule(name) for name in branches}}, graph)


def _any() -> fx.GraphModule:
    graph = fx.Graph()
    graph.output((graph.call_function(torch.any, (graph.placeholder("is_open"),)),))
    return LazyGraphModule({}, graph)
