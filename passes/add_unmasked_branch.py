"""Execute a block without its masks where every token of the call is open.

Before, in a lowered block::

    open, routing_mask, needed = decide(router_input, least_score, token_mask)
    hidden, key, value = cond(needed, then_branch, else_branch, [hidden, …, open])

After::

    open, routing_mask, needed, all_open = decide(router_input, least_score, token_mask)
    hidden, key, value = cond(all_open, then_branch, else_branch, [hidden, …, open, needed])

    then_branch:  hidden, key, value = block(hidden, …)                    # what was masked, or a group of these
    else_branch:  cond(needed, then_branch, else_branch, [hidden, …, open])                       # as before

A decode step of one row has one token: where a block is executed, every token is open, and nothing is left of a mask,
of what it keeps from being fused (a sum and the norm behind it, of two blocks of a group), and of an adapter.
"""

import operator

import torch
from torch import fx, nn

from modcompile.passes.add_unused_inputs import add_unused_inputs
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
    results,
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
    graph, outputs = copy_graph(lowered)
    graph.output(outputs)
    decide, masked = (lowered.get_submodule(name) for name in ("decide", "then_branch"))
    assert isinstance(decide, fx.GraphModule)
    assert isinstance(masked, fx.GraphModule)
    (decided,) = graph.find_nodes(op="call_module", target="decide")
    (cond,) = graph.find_nodes(op="call_function", target=_cond)
    needed, then_branch, else_branch, operands = cond.args
    assert isinstance(operands, list | tuple)
    with graph.inserting_before(cond):
        all_open = graph.call_function(operator.getitem, (decided, len(results(decided))))
    cond.args = (all_open, then_branch, else_branch, (*operands, needed))
    graph.lint()
    children = {
        "decide": _tell_whether_all_are_open(decide),
        "then_branch": add_unused_inputs(map_blocks(masked, _without_mask), ["needed"]),
        "else_branch": _masked_or_skipped(lowered, masked),
    }
    return LazyGraphModule(children, graph)


def _without_mask(masked: fx.GraphModule) -> fx.GraphModule:
    return add_unused_inputs(inner_block(masked), ["is_open"])


def _tell_whether_all_are_open(decide: fx.GraphModule) -> fx.GraphModule:
    graph, outputs = copy_graph(decide)
    is_open = outputs[0]
    graph.output((*outputs, graph.call_function(torch.all, (is_open,))))
    return LazyGraphModule(dict(decide.named_children()), graph)


def _masked_or_skipped(lowered: fx.GraphModule, masked: fx.GraphModule) -> fx.GraphModule:
    graph = fx.Graph()
    operands = [graph.placeholder(node.name) for node in masked.graph.find_nodes(op="placeholder")]
    needed = graph.placeholder("needed")
    then_branch, else_branch = graph.get_attr("then_branch"), graph.get_attr("else_branch")
    values = graph.call_function(_cond, (needed, then_branch, else_branch, tuple(operands)))
    graph.output(tuple(getitems(values, num_outputs(masked))))
    return LazyGraphModule({"then_branch": masked, "else_branch": lowered.get_submodule("else_branch")}, graph)
