"""Lower boolean routing masks to control flow: a block that no token of the call needs is not executed.

Before, in a routed block::

    open, routing_mask = decide(router_input, least_score, token_mask)
    hidden, key, value = block(hidden, …, open)

After::

    open, routing_mask, needed = decide(router_input, least_score, token_mask)
    hidden, key, value = cond(needed, then_branch, else_branch, [hidden, …, open])

    decide:       as before, and needed = any(open)
    then_branch:  what block was: masked_block, or a group of these
    else_branch:  hidden, key, value = skip(hidden, …)                            # skip_block, or a group of these

The result is the form for inference: no gradient reaches parameters inside the branches of a `torch.cond`.

What it costs where every block is executed (`python -m benchmarks.routing_overhead`, a decode step of SmolLM2-135M in
groups of 128 on one thread, ten gates of three blocks each, five decided at once): 5.7 % where tokens are compact and
4.0 % with masks, of which the `If`s are 2.2 % (28 µs each), the masks and the norms that can't be fused across them
1.5 %, deciding 0.3 %. With a branch without masks beside it (`add_unmasked_branch`) it is 4.1 %, however blocks are
masked; and with adapters of low rank 3.7 %, without that branch 8.5 %. Why it is not the 2.5 % of `If`s and decisions
is not known (taking out the `If` in the other branch changes nothing). It is the serial part of a step: with more
threads its share grows.
"""

import torch
from torch import fx, nn

from modcompile.passes.add_unused_inputs import add_unused_inputs
from modcompile.passes.eliminate_dead_code import eliminate_dead_code
from modcompile.passes.lazy_graph_module import LazyGraphModule
from modcompile.passes.map_blocks import map_blocks
from modcompile.passes.outlined_form import called_modules, copy_graph, getitems, inner_block, routed_calls
from modcompile.passes.skip_block import skip_block
from modcompile.passes.skip_path import skip_of


def lower_gates(gm: fx.GraphModule) -> fx.GraphModule:
    """Return the graph of `harden_gates` with each routed block's work under a `torch.cond`.

    Keeps equal: every output. The branches share their parameters with the block.

    Raises:
        UnsupportedModelError: a block writes to a tensor in place.
    """
    graph, outputs = copy_graph(gm)
    modules: dict[str, nn.Module | torch.Tensor] = dict(called_modules(gm))
    for node in graph.find_nodes(op="get_attr"):
        modules[str(node.target)] = getattr(gm, str(node.target))
    for call in routed_calls(gm, graph):
        block = gm.get_submodule(str(call.target))
        assert isinstance(block, fx.GraphModule)
        modules[str(call.target)] = _lower_block(block)
    graph.output(outputs)
    return LazyGraphModule(modules, graph)


def _lower_block(hard: fx.GraphModule) -> fx.GraphModule:
    graph, (*outputs, _) = copy_graph(hard)
    (call,) = graph.find_nodes(op="call_module", target="block")
    block, decide = hard.get_submodule("block"), hard.get_submodule("decide")
    assert isinstance(block, fx.GraphModule)
    assert isinstance(decide, fx.GraphModule)

    (decided,) = graph.find_nodes(op="call_module", target="decide")
    decision = graph.call_module("decide", decided.args)
    is_open, mask, needed = getitems(decision, 3)
    then_branch, else_branch = graph.get_attr("then_branch"), graph.get_attr("else_branch")
    operands = (*call.args[:-1], is_open)
    values = graph.call_function(torch.ops.higher_order.cond, (needed, then_branch, else_branch, operands))
    graph.output((*getitems(values, len(outputs)), mask))
    eliminate_dead_code(graph)
    children = {
        "decide": _decide_once_for_all_tokens(decide),
        "then_branch": block,
        "else_branch": map_blocks(block, _skipped),
    }
    return LazyGraphModule(children, graph)


def _skipped(masked: fx.GraphModule) -> fx.GraphModule:
    return add_unused_inputs(skip_block(inner_block(masked), skip_of(masked)), ["is_open"])


def _decide_once_for_all_tokens(decide: fx.GraphModule) -> fx.GraphModule:
    graph, outputs = copy_graph(decide)
    is_open, routing_mask = outputs
    graph.output((is_open, routing_mask, graph.call_function(torch.any, (is_open,))))
    return LazyGraphModule(dict(decide.named_children()), graph)
