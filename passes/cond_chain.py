"""Choose between several branches by control flow one level deep.

Before, with a boolean `is_k []` for each branch, of which one is true::

    values = branch_k(…)      # of the k that is_k says

After, for two branches::

    values = cond(is_0, branch_0, branch_1)(…)

and for more::

    values = cond(is_0, branch_0, nothing)(…)
    values = cond(is_1, take_1, keep)(…, *values)
    values = cond(is_2, take_2, keep)(…, *values)

where `nothing` returns empty tensors, `take_k` is branch_k, and `keep` returns clones of `values`. The branches stand
side by side, one `cond` deep: ONNX Runtime prepares no quantized weight of the main graph that is used deeper, and is
some hundred times slower with it.
"""

from collections.abc import Sequence

import torch
from torch import fx, nn

from modcompile.passes.add_unused_inputs import add_unused_inputs
from modcompile.passes.lazy_graph_module import LazyGraphModule
from modcompile.passes.outlined_form import getitems, num_outputs

_cond = torch.ops.higher_order.cond
_HIDDEN_RANK, _CACHE_RANK = 3, 4


def add_cond_chain(
    graph: fx.Graph,
    modules: dict[str, nn.Module],
    branches: Sequence[fx.GraphModule],
    conditions: Sequence[fx.Node],
    operands: Sequence[fx.Node],
) -> list[fx.Node]:
    """Add the chain at the end of `graph`, and what it calls to `modules`; return the values.

    `branches` take `operands`, and return a hidden state, keys and values. Of one alone there is no choice.
    """
    count = num_outputs(branches[0])
    modules["branch_0"] = branches[0]
    if len(branches) == 1:
        return getitems(graph.call_module("branch_0", tuple(operands)), count)
    first = graph.get_attr("branch_0")
    if len(branches) == 2:
        modules["branch_1"] = branches[1]
        other = graph.get_attr("branch_1")
        return getitems(graph.call_function(_cond, (conditions[0], first, other, tuple(operands))), count)
    modules["nothing"] = _nothing(branches[0], count)
    nothing = graph.get_attr("nothing")
    values = getitems(graph.call_function(_cond, (conditions[0], first, nothing, tuple(operands))), count)
    previous = [f"previous_{index}" for index in range(count)]
    modules["keep"] = _keep(branches[0], previous)
    for index in range(1, len(branches)):
        modules[f"take_{index}"] = add_unused_inputs(branches[index], previous)
        take, keep = graph.get_attr(f"take_{index}"), graph.get_attr("keep")
        chosen = graph.call_function(_cond, (conditions[index], take, keep, (*operands, *values)))
        values = getitems(chosen, count)
    return values


def branches_of_chain(block: nn.Module) -> list[nn.Module]:
    """The branches that `add_cond_chain` has added to a block's children, in their order."""
    named = dict(block.named_children())
    others = [name for name in named if name == "branch_1" or name.startswith("take_")]
    return [named["branch_0"], *(named[name] for name in sorted(others, key=lambda name: int(name.split("_")[1])))]


def _nothing(branch: fx.GraphModule, count: int) -> fx.GraphModule:
    graph = fx.Graph()
    hidden, *_ = [graph.placeholder(node.name) for node in branch.graph.find_nodes(op="placeholder")]
    ranks = [_HIDDEN_RANK] + [_CACHE_RANK] * (count - 1)
    graph.output(tuple(graph.call_method("new_zeros", (hidden, [0] * rank)) for rank in ranks))
    return LazyGraphModule({}, graph)


def _keep(branch: fx.GraphModule, previous: Sequence[str]) -> fx.GraphModule:
    graph = fx.Graph()
    for node in branch.graph.find_nodes(op="placeholder"):
        graph.placeholder(node.name)
    values = [graph.placeholder(name) for name in previous]
    # A branch of a cond must not return its input itself.
    graph.output(tuple(graph.call_function(torch.clone, (value,)) for value in values))
    return LazyGraphModule({}, graph)
