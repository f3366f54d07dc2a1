"""Give decoder blocks a branch for each precision, and a router that weighs them.

Before::

    hidden = blocks.i(hidden, *shared)

After::

    token_mask = token_mask(input_ids, attention_mask)
    hidden, precision_weights = blocks.i(hidden, *shared, token_mask)

where blocks.i is now, with P branches, `router_logits [B, P]` and `precision_weights [B, 1, P]`::

    router_logits = router(hidden, token_mask)
    precision_weights = mixer(router_logits)
    y_0, …, y_P-1 = branches(hidden, *shared)
    hidden = precision_weights[…, 0] * y_0 + … + precision_weights[…, P-1] * y_P-1

and the weights of the routed blocks are the last outputs of the graph, in the order of the layers. It
is the form for training, of a graph without keys and values.
"""

import operator
from collections.abc import Mapping, Sequence

import torch
from torch import fx, nn

from modcompile.passes.merge_branches import merge_branches
from modcompile.passes.outlined_form import block_calls, called_modules, copy_graph, results


class TokenMask(nn.Module):
    """Which of the tokens of a call are not padding, bool `[B, T, 1]`."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return (attention_mask[:, attention_mask.shape[1] - input_ids.shape[1] :] != 0).unsqueeze(-1)


def insert_precision_branches(
    gm: fx.GraphModule,
    branches: Mapping[int, Mapping[int, fx.GraphModule]],
    routers: Mapping[int, nn.Module],
    mixer: nn.Module,
) -> fx.GraphModule:
    """Return the outlined form with mixed blocks at the layers that are keys of `branches`.

    `branches[i]` are versions of block i by their bits, in the order of the router's logits.

    Keeps equal: where the mixer chooses one branch alone, the graph with that branch in the place of the block.
    """
    graph, outputs = copy_graph(gm)
    modules = called_modules(gm)
    modules["token_mask"] = TokenMask()
    input_ids, attention_mask, *_, last = graph.find_nodes(op="placeholder")
    with graph.inserting_after(last):
        token_mask = graph.call_module("token_mask", (input_ids, attention_mask))
    weights = []
    for index, call in enumerate(block_calls(graph)):
        if index not in branches:
            continue
        (value,) = results(call)
        call.args = (*call.args, token_mask)
        modules[str(call.target)] = _mixed_block(branches[index], routers[index], mixer)
        with graph.inserting_after(value):
            weights.append(graph.call_function(operator.getitem, (call, 1)))
    graph.output((*outputs, *weights))
    graph.lint()
    return fx.GraphModule(modules, graph)


def _mixed_block(branches: Mapping[int, fx.GraphModule], router: nn.Module, mixer: nn.Module) -> fx.GraphModule:
    graph = fx.Graph()
    merged = merge_branches(list(branches.values()), [str(bits) for bits in branches])
    inputs: Sequence[fx.Node] = [graph.placeholder(node.name) for node in merged.graph.find_nodes(op="placeholder")]
    token_mask = graph.placeholder("token_mask")
    router_logits = graph.call_module("router", (inputs[0], token_mask))
    weights = graph.call_module("mixer", (router_logits,))
    outputs = graph.call_module("branches", tuple(inputs))
    total: fx.Node | None = None
    for index in range(len(branches)):
        output = graph.call_function(operator.getitem, (outputs, index))
        weight = graph.call_function(torch.ops.aten.slice.Tensor, (weights, 2, index, index + 1))
        part = graph.call_function(operator.mul, (weight, output))
        total = part if total is None else graph.call_function(operator.add, (total, part))
    graph.output((total, weights))
    return fx.GraphModule({"router": router, "mixer": mixer, "branches": merged}, graph)
