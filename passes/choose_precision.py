"""Give decoder blocks a branch for each precision, of which routers pick one for every call, or for every token.

Before::

    hidden, key, value = blocks.i(hidden, *shared, past_key, past_value)

After, with the buffer `precision_bias [R, P]` of the graph (zeros), a row of it for each routed block::

    token_mask, token_weights, has_tokens, *biases = precision_inputs(input_ids, attention_mask, precision_bias)
    hidden, key, value, bits = blocks.i(hidden, *shared, past_key, past_value, token_mask, …, bias)

where blocks.i is now (the decision is that of `decide_precision`, the chain of `torch.cond` that of `cond_chain`)::

    is_0, …, bits, selection = decide(hidden, token_mask, …, bias)
    hidden, key, value = version_k(hidden, …, selection)      # of the k for which is_k is true

and the bits that the routed blocks gave each token (int64 `[B, T]`) are the last outputs of the graph.

The versions are the branches. Decided for tokens, one more is `mix_branches`, for calls in which they differ: what a
block makes of a token then does not depend on its neighbours. A block that also has a depth gate has as its first
version one that is skipped (0 bits, `skip_path`; its keys and values are those of the lowest precision), and the others
change the open tokens only. It is the form for inference.
"""

import operator
from collections.abc import Mapping, Sequence

import torch
from torch import fx, nn

from modcompile.passes.add_unused_inputs import add_unused_inputs
from modcompile.passes.cond_chain import add_cond_chain
from modcompile.passes.decide_precision import DecideForSequences, DecideForTokens, PrecisionInputs
from modcompile.passes.eliminate_dead_code import eliminate_dead_code
from modcompile.passes.harden_gates import RoutingInputs, score_and_bias
from modcompile.passes.lazy_graph_module import LazyGraphModule
from modcompile.passes.masked_block import masked_block
from modcompile.passes.mix_branches import SelectByIndex, mix_branches
from modcompile.passes.outlined_form import block_calls, called_modules, copy_graph, getitems, results
from modcompile.passes.skip_block import skip_block

_OF_TOKENS = ("token_mask", "token_weights", "has_tokens")


def choose_precision(
    gm: fx.GraphModule,
    branches: Mapping[int, Mapping[int, fx.GraphModule]],
    routers: Mapping[int, nn.Module],
    *,
    for_tokens: bool = False,
    depth_routers: Mapping[int, nn.Module] | None = None,
    adapters: Mapping[int, nn.Module] | None = None,
) -> fx.GraphModule:
    """Return the outlined form with branched blocks at the layers that are keys of `branches`.

    `branches[i]` are versions of block i by their bits, the lowest first, in the order of the router's logits.
    `depth_routers`, for some of these layers in order, give them a depth gate each, and `adapters` what skipped tokens
    go through; there is then also a buffer `routing_threshold`, one threshold for each of them, as in `harden_gates`.

    Keeps equal: in every call, the graph with the chosen branches in the place of the blocks.
    """
    graph, outputs = copy_graph(gm)
    modules: dict[str, nn.Module | torch.Tensor] = dict(called_modules(gm))
    device = next(gm.parameters()).device
    depth = {layer: score_and_bias(router, device) for layer, router in (depth_routers or {}).items()}
    input_ids, attention_mask, *_ = graph.find_nodes(op="placeholder")
    with graph.inserting_before(next(node for node in graph.nodes if node.op != "placeholder")):
        modules["precision_inputs"] = PrecisionInputs()
        modules["precision_bias"] = torch.zeros(len(branches), len(next(iter(branches.values()))), device=device)
        bias = graph.get_attr("precision_bias")
        shared = graph.call_module("precision_inputs", (input_ids, attention_mask, bias))
        values = getitems(shared, len(_OF_TOKENS) + len(branches))
        of_tokens, biases = values[: len(_OF_TOKENS)], values[len(_OF_TOKENS) :]
        inputs = {layer: [*of_tokens, bias] for layer, bias in zip(branches, biases, strict=True)}
        if depth:
            modules["routing_inputs"] = RoutingInputs(bias for _, bias in depth.values())
            modules["routing_threshold"] = torch.full((len(depth),), 0.5, device=device)
            threshold = graph.get_attr("routing_threshold")
            gates = graph.call_module("routing_inputs", (input_ids, attention_mask, threshold))
            for layer, least_score in zip(depth, getitems(gates, 1 + len(depth))[1:], strict=True):
                inputs[layer].append(least_score)
    bits = []
    for layer, call in enumerate(block_calls(graph)):
        if layer not in branches:
            continue
        values = results(call)
        call.args = (*call.args, *inputs[layer])
        score = depth[layer][0] if layer in depth else None
        skip = (adapters or {}).get(layer)
        modules[str(call.target)] = _branched_block(branches[layer], routers[layer], score, skip, for_tokens=for_tokens)
        with graph.inserting_after(values[-1]):
            bits.append(graph.call_function(operator.getitem, (call, len(values))))
    graph.output((*outputs, *bits))
    eliminate_dead_code(graph)
    graph.lint()
    return LazyGraphModule(modules, graph)


def _branched_block(
    by_precision: Mapping[int, fx.GraphModule],
    router: nn.Module,
    score: nn.Module | None,
    skip: nn.Module | None,
    *,
    for_tokens: bool,
) -> fx.GraphModule:
    branches, precisions = list(by_precision.values()), list(by_precision)
    decide: nn.Module
    if for_tokens and (score is not None or len(branches) > 1):
        decide = DecideForTokens(router, precisions, score)
        versions = _versions_for_tokens(branches, skip, can_skip=score is not None)
    else:
        decide = DecideForSequences(router, precisions, score)
        versions = branches if score is None else _versions_for_sequences(branches, skip)
    graph = fx.Graph()
    operands = [graph.placeholder(node.name) for node in branches[0].graph.find_nodes(op="placeholder")]
    names = [*_OF_TOKENS, "bias", *(["least_score"] if score is not None else [])]
    decided = graph.call_module("decide", (operands[0], *map(graph.placeholder, names)))
    *conditions, bits = getitems(decided, len(versions) + 1)
    if versions is not branches:
        operands.append(graph.call_function(operator.getitem, (decided, len(versions) + 1)))
    modules: dict[str, nn.Module] = {"decide": decide}
    values = add_cond_chain(graph, modules, versions, conditions, operands)
    graph.output((*values, bits))
    return LazyGraphModule(modules, graph)


def _versions_for_sequences(branches: Sequence[fx.GraphModule], skip: nn.Module | None) -> list[fx.GraphModule]:
    """Skipped, and every branch for the open tokens only; they also take `is_open [B, T, 1]`."""
    skipped = add_unused_inputs(skip_block(branches[0], skip), ["is_open"])
    return [skipped, *(masked_block(branch, skip) for branch in branches)]


def _versions_for_tokens(
    branches: Sequence[fx.GraphModule], skip: nn.Module | None, *, can_skip: bool
) -> list[fx.GraphModule]:
    """Each for all tokens, and all mixed; they also take the version of each token, `[B, T, 1]`."""
    versions = [skip_block(branches[0], skip), *branches] if can_skip else list(branches)
    alone = [add_unused_inputs(version, ["selection"]) for version in versions]
    return [*alone, mix_branches(versions, SelectByIndex())]
