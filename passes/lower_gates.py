"""Lower boolean routing masks to control flow: a block that no token of the call needs is not executed.

Before, in a routed block::

    open, routing_mask = decide(hidden, least_score, token_mask)
    y, key, value = block(hidden, …)
    hidden = where(open, y, hidden)

After::

    open, routing_mask, needed = decide(hidden, least_score, token_mask)
    hidden, key, value = cond(needed, then_branch, else_branch, [open, hidden, …])

    decide:       as before, and needed = any(open)
    then_branch:  y, key, value = block(hidden, …);  hidden = where(open, y, hidden)
    else_branch:  key, value = cache_update(hidden, …);  hidden = clone(hidden)

where `cache_update` is the part of the block that its keys and values need. It is not written by hand: it is the block
without its hidden output, after dead-code elimination. The result is the form for inference: no gradient reaches
parameters inside the branches of a `torch.cond`.
"""

import operator

import torch
from torch import fx, nn

from modcompile.errors import UnsupportedModelError
from modcompile.passes.eliminate_dead_code import eliminate_dead_code, is_mutating
from modcompile.passes.outlined_form import called_modules, copy_graph, routed_calls


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
    return fx.GraphModule(modules, graph)


def _lower_block(hard: fx.GraphModule) -> fx.GraphModule:
    graph, (_, *cache, _) = copy_graph(hard)
    (call,) = graph.find_nodes(op="call_module", target="block")
    block, decide = hard.get_submodule("block"), hard.get_submodule("decide")
    assert isinstance(block, fx.GraphModule)
    assert isinstance(decide, fx.GraphModule)

    (decided,) = graph.find_nodes(op="call_module", target="decide")
    decision = graph.call_module("decide", decided.args)
    is_open, mask, needed = [graph.call_function(operator.getitem, (decision, index)) for index in range(3)]
    then_branch, else_branch = graph.get_attr("then_branch"), graph.get_attr("else_branch")
    operands = (is_open, *call.args)
    values = graph.call_function(torch.ops.higher_order.cond, (needed, then_branch, else_branch, operands))
    replaced = [graph.call_function(operator.getitem, (values, index)) for index in range(1 + len(cache))]
    graph.output((*replaced, mask))
    eliminate_dead_code(graph)
    children = {
        "decide": _decide_once_for_all_tokens(decide),
        "then_branch": _then_branch(block, len(cache)),
        "else_branch": _else_branch(block),
    }
    return fx.GraphModule(children, graph)


def _decide_once_for_all_tokens(decide: fx.GraphModule) -> fx.GraphModule:
    graph, outputs = copy_graph(decide)
    is_open, routing_mask = outputs
    graph.output((is_open, routing_mask, graph.call_function(torch.any, (is_open,))))
    return fx.GraphModule(dict(decide.named_children()), graph)


def _then_branch(block: fx.GraphModule, cache_tensors: int) -> fx.GraphModule:
    graph = fx.Graph()
    is_open = graph.placeholder("is_open")
    inputs = [graph.placeholder(node.name) for node in block.graph.find_nodes(op="placeholder")]
    values = graph.call_module("block", tuple(inputs))
    executed, *cache = [graph.call_function(operator.getitem, (values, index)) for index in range(1 + cache_tensors)]
    graph.output((graph.call_function(torch.where, (is_open, executed, inputs[0])), *cache))
    return fx.GraphModule({"block": block}, graph)


def _else_branch(block: fx.GraphModule) -> fx.GraphModule:
    graph, (_, *cache) = copy_graph(block)
    inputs = graph.find_nodes(op="placeholder")
    with graph.inserting_before(inputs[0]):
        graph.placeholder("is_open")
    # A branch of a cond must not return its input itself.
    graph.output((graph.call_function(torch.clone, (inputs[0],)), *cache))
    eliminate_dead_code(graph)
    for node in graph.nodes:
        if is_mutating(node):
            raise UnsupportedModelError(
                f"a decoder block writes to a tensor in place ({node.target}), so what its keys and values need can't "
                "be cut out of it; write that operation out of place"
            )
    return fx.GraphModule(block, graph)
