"""Give decoder blocks a branch for each precision, and a router that weighs them.

Before::

    hidden = blocks.i(hidden, *shared)

After::

    token_weights = token_weights(input_ids, attention_mask)          # what makes a sum the mean of a row's tokens
    hidden, precision_weights = blocks.i(hidden, *shared, token_weights)

where blocks.i is now, with P branches, and S = 1 for weights of whole sequences or T for those of tokens::

    router_logits = router(hidden, token_weights)          # [B, S, P]
    precision_weights = mixer(router_logits)               # [B, S, P]
    hidden = branches(hidden, *shared, precision_weights)

    branches:  y_k = branch_k(hidden, *shared);  precision_weights[…, 0] * y_0 + precision_weights[…, 1] * y_1 + …

and the weights of the routed blocks are the last outputs of the graph, in the order of the layers. A block that also
has a depth gate has as its first branch one that is skipped (`skip_path`), of weight `1 - gate`, and the gates
`[B, T, 1]` come after the weights. In a graph with keys and values these are mixed likewise, and attended to as they
are mixed (`mix_branches`): with weights of tokens that is what `choose_precision` does. Without them, each branch
attends to its own. It is the form for training.
"""

import operator
from collections.abc import Mapping

import torch
from torch import fx, nn

from modcompile.passes.decide_precision import token_weights_of
from modcompile.passes.lazy_graph_module import LazyGraphModule
from modcompile.passes.mix_branches import WeightedSum, mix_branches
from modcompile.passes.outlined_form import block_calls, called_modules, copy_graph, getitems, num_outputs, results
from modcompile.passes.sampled_branches import SampledBranches
from modcompile.passes.skip_block import skip_block
from modcompile.passes.token_mask import token_mask_of


class TokenWeights(nn.Module):
    """What makes a sum over a row the mean of its tokens, `[B, T, 1]`."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return token_weights_of(token_mask_of(input_ids, attention_mask))


def insert_precision_branches(
    gm: fx.GraphModule,
    branches: Mapping[int, Mapping[int, fx.GraphModule]],
    routers: Mapping[int, nn.Module],
    mixer: nn.Module,
    *,
    sampled: bool = False,
    depth_routers: Mapping[int, nn.Module] | None = None,
    gate: nn.Module | None = None,
    adapters: Mapping[int, nn.Module] | None = None,
) -> fx.GraphModule:
    """Return the outlined form with mixed blocks at the layers that are keys of `branches`.

    `branches[i]` are versions of block i by their bits, in the order of the router's logits. Where they are `sampled`,
    one of them runs in a training step (`sampled_branches`). `depth_routers`, for some of these layers, and `gate` give
    them a depth gate each, and `adapters` what skipped tokens go through.

    Keeps equal: where the mixer chooses one branch alone, the graph with that branch in the place of the block.
    """
    graph, outputs = copy_graph(gm)
    modules = called_modules(gm)
    modules["token_weights"] = TokenWeights()
    input_ids, attention_mask, *_, last = graph.find_nodes(op="placeholder")
    with graph.inserting_after(last):
        token_weights = graph.call_module("token_weights", (input_ids, attention_mask))
    weights, gates = [], []
    for index, call in enumerate(block_calls(graph)):
        if index not in branches:
            continue
        values = results(call)
        call.args = (*call.args, token_weights)
        versions = list(branches[index].values())
        deciding = {"router": routers[index], "mixer": mixer}
        if depth_routers and index in depth_routers:
            assert gate is not None
            deciding |= {"depth_router": depth_routers[index], "gate": gate}
        skip = (adapters or {}).get(index)
        modules[str(call.target)] = _mixed_block(versions, deciding, skip, sampled=sampled)
        with graph.inserting_after(values[-1]):
            weights.append(graph.call_function(operator.getitem, (call, len(values))))
        if "gate" in deciding:
            with graph.inserting_after(weights[-1]):
                gates.append(graph.call_function(operator.getitem, (call, len(values) + 1)))
    graph.output((*outputs, *weights, *gates))
    graph.lint()
    return LazyGraphModule(modules, graph)


def gated_weights(weights: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """From `[B, S, P]` and the gate `[B, T, 1]` to `[B, T, P + 1]`: what is skipped comes first."""
    return torch.cat([1 - gate, gate * weights], -1)


def _mixed_block(
    branches: list[fx.GraphModule], deciding: dict[str, nn.Module], skip: nn.Module | None, *, sampled: bool
) -> fx.GraphModule:
    gated = "gate" in deciding
    versions = [skip_block(branches[0], skip), *branches] if gated else branches
    mixed = mix_branches(versions, WeightedSum())
    *taken, _ = mixed.graph.find_nodes(op="placeholder")
    graph = fx.Graph()
    inputs = [graph.placeholder(node.name) for node in taken]
    token_weights = graph.placeholder("token_weights")
    router_logits = graph.call_module("router", (inputs[0], token_weights))
    weights = graph.call_module("mixer", (router_logits,))
    decided, shares = [weights], weights
    if gated:
        depth_logits = graph.call_module("depth_router", (inputs[0],))
        decided.append(graph.call_module("gate", (depth_logits,)))
        shares = graph.call_function(gated_weights, tuple(decided))
    values = getitems(graph.call_module("branches", (*inputs, shares)), num_outputs(mixed))
    graph.output((*values, *decided))
    called = SampledBranches(versions, mixed) if sampled else mixed
    return LazyGraphModule(deciding | {"branches": called}, graph)
