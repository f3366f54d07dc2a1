"""Compute the norm that a block begins with in the block before it, where it can be fused with that block's last sum.

Before::

    hidden, key_0, value_0 = blocks.0(hidden, …)          # …; hidden = add(x, y)
    hidden, key_1, value_1 = blocks.1(hidden, …)         # normed = rms_norm(hidden, [H], weight, eps); …

After::

    hidden, key_0, value_0, normed = blocks.0(hidden, …)   # …; hidden = add(x, y); normed = rms_norm(hidden, …)
    hidden, key_1, value_1 = blocks.1(hidden, …, normed)

Only between blocks that are always executed: the first sum of what follows a skipped block is not the skipped one's.
"""

import operator
from itertools import pairwise
from typing import Any

import torch
from torch import fx

from modcompile.passes.extract_subgraph import get_attribute
from modcompile.passes.graph_calls import append_arguments, append_placeholders
from modcompile.passes.graph_patterns import is_call
from modcompile.passes.lazy_graph_module import LazyGraphModule
from modcompile.passes.outlined_form import block_calls, copy_graph, results, routed_calls

_rms_norm = torch.ops.aten.rms_norm.default
_NORMED, _WEIGHT = "normed", "next_norm_weight"


def carry_norms(gm: fx.GraphModule) -> fx.GraphModule:
    """Return the graph, in outlined form or lowered, with norms carried; parameters are shared with `gm`.

    Keeps equal: every output, bit for bit.
    """
    graph, outputs = copy_graph(gm)
    graph.output(outputs)
    names = {str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr")}
    modules: dict[str, Any] = {name: get_attribute(gm, name) for name in names}
    routed = routed_calls(gm, graph)
    calls = block_calls(graph)
    for call, following in pairwise(calls):
        if call in routed or following in routed or results(call)[0] is not following.args[0]:
            continue
        taken = _take_norm(modules[str(following.target)])
        if taken is None:
            continue
        modules[str(following.target)], weight, eps = taken
        modules[str(call.target)] = _give_norm(modules[str(call.target)], weight, eps)
        last = results(call)[-1]
        with graph.inserting_after(last):
            normed = graph.call_function(operator.getitem, (call, int(str(last.args[1])) + 1))
        normed.meta = dict(results(call)[0].meta)
        append_arguments(following, [normed])
    graph.lint()
    return LazyGraphModule(modules, graph)


def _take_norm(block: fx.GraphModule) -> tuple[fx.GraphModule, torch.Tensor, float] | None:
    """The block with its first norm as an input, the norm's weight and eps; None if it does not begin with one."""
    graph, outputs = copy_graph(block)
    hidden = graph.find_nodes(op="placeholder")[0]
    norms = [user for user in hidden.users if is_call(user, _rms_norm) and len(user.args) == 4 and not user.kwargs]
    if len(norms) != 1:
        return None
    (norm,) = norms
    _, _, weight, eps = norm.args
    assert isinstance(weight, fx.Node)
    assert isinstance(eps, float)
    (normed,) = append_placeholders(graph, [_NORMED])
    normed.meta = dict(norm.meta)
    norm.replace_all_uses_with(normed)
    graph.erase_node(norm)
    graph.output(outputs)
    return LazyGraphModule(block, graph), get_attribute(block, str(weight.target)), eps


def _give_norm(block: fx.GraphModule, weight: torch.Tensor, eps: float) -> fx.GraphModule:
    graph, (hidden, *cache) = copy_graph(block)
    normed = graph.call_function(_rms_norm, (hidden, [weight.shape[0]], graph.get_attr(_WEIGHT), eps))
    normed.meta = dict(hidden.meta)
    graph.output((hidden, *cache, normed))
    names = {str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr")} - {_WEIGHT}
    return LazyGraphModule({_WEIGHT: weight, **{name: get_attribute(block, name) for name in names}}, graph)
