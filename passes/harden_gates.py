"""Turn soft gates into boolean decisions at a threshold.

Before, in a routed block::

    router_logits = router(router_input)
    gate = gate(router_logits)
    hidden, key, value = block(hidden, …, gate)                                   # mixed_block

After, with a threshold for each of R gates as the buffer `routing_threshold [R]` of the graph::

    open, routing_mask = decide(router_input, least_score, token_mask)
    hidden, key, value = block(hidden, …, open)                                   # masked_block

    decide:  open = score(router_input) > least_score;  routing_mask = open & token_mask

where a router is `score(router_input) + bias`. What `sigmoid(router_logits) > threshold` has for all gates in common is
worked out once: `least_score [B, T, 1]` is `log(t / (1 - t)) - bias` of the threshold t clamped to [0, 1]. So a
threshold of 0 is -inf and executes every token even where the sigmoid would round to 0, one of 1 or more is +inf and
skips every token, and a gate is left with one comparison.

`token_mask` is false where the attention mask says padding. Padding is never open and so asks for no work, except at a
threshold of 0: there it is executed like any token, so that the result is the dense model's everywhere.
"""

import operator
from collections.abc import Iterable
from typing import cast

import torch
from torch import fx, nn

from modcompile.passes.eliminate_dead_code import eliminate_dead_code
from modcompile.passes.lazy_graph_module import LazyGraphModule
from modcompile.passes.map_blocks import map_blocks
from modcompile.passes.masked_block import masked_block
from modcompile.passes.outlined_form import called_modules, copy_graph, getitems, inner_block, routed_calls
from modcompile.passes.skip_path import skip_of
from modcompile.passes.token_mask import token_mask_of


class RoutingInputs(nn.Module):
    """What all decisions share: the mask of tokens `[B, T, 1]`, and the least score of each gate `[B, T, 1]`.

    With `sizes`, those of so many consecutive gates in one tensor: `[B, T, size]` for each of them. The routers' biases
    are shared with the routers.
    """

    def __init__(self, biases: Iterable[torch.Tensor], sizes: Iterable[int] | None = None) -> None:
        super().__init__()
        self.biases = nn.ParameterList(biases)
        self.sizes = [1] * len(self.biases) if sizes is None else list(sizes)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, routing_threshold: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        token_mask = token_mask_of(input_ids, attention_mask)
        threshold = routing_threshold.clamp(0, 1)
        of_tokens = torch.log(threshold / (1 - threshold)) - torch.cat(list(self.biases))
        of_padding = torch.where(threshold > 0, float("inf"), float("-inf"))
        return token_mask, *torch.split(torch.where(token_mask, of_tokens, of_padding), self.sizes, dim=-1)

    def extra_repr(self) -> str:
        return f"sizes={self.sizes}"


def harden_gates(gm: fx.GraphModule) -> fx.GraphModule:
    """Return the routed graph with boolean routing masks `[B, T, 1]` as its last outputs, in place of the gates.

    A routing mask is true for the tokens (padding excluded) that a block, or a group, is executed for. The buffer
    `routing_threshold` starts at 0.5 for every gate. Blocks and routers are shared with `gm`.

    Keeps equal: keys and values of every layer; the hidden state of every token whose gate is exactly 0 or 1.
    """
    graph, outputs = copy_graph(gm)
    calls = routed_calls(gm, graph)
    modules: dict[str, nn.Module | torch.Tensor] = dict(called_modules(gm))
    device = next(gm.parameters()).device
    routers = [score_and_bias(gm.get_submodule(f"{call.target}.router"), device) for call in calls]
    modules["routing_inputs"] = RoutingInputs(bias for _, bias in routers)
    modules["routing_threshold"] = torch.full((len(calls),), 0.5, device=device)

    input_ids, attention_mask, *_, last = graph.find_nodes(op="placeholder")
    with graph.inserting_after(last):
        threshold = graph.get_attr("routing_threshold")
    with graph.inserting_after(threshold):
        shared = graph.call_module("routing_inputs", (input_ids, attention_mask, threshold))
    with graph.inserting_after(shared):
        token_mask = graph.call_function(operator.getitem, (shared, 0))
    for position, (call, (score, _)) in enumerate(zip(calls, routers, strict=True)):
        with graph.inserting_before(call):
            least_score = graph.call_function(operator.getitem, (shared, 1 + position))
        call.args += (least_score, token_mask)
        block = gm.get_submodule(str(call.target))
        assert isinstance(block, fx.GraphModule)
        modules[str(call.target)] = _harden_block(block, score)
    graph.output(outputs)
    graph.lint()
    return LazyGraphModule(modules, graph)


def score_and_bias(router: nn.Module, device: torch.device) -> tuple[nn.Module, torch.Tensor]:
    """A router as `score(router_input) + bias`; one that does not tell them apart is all score."""
    if hasattr(router, "score"):
        return cast(nn.Module, router.score), cast(torch.Tensor, router.bias)
    return router, torch.zeros(1, device=device)


def _harden_block(soft: fx.GraphModule, score: nn.Module) -> fx.GraphModule:
    graph, (*outputs, _) = copy_graph(soft)
    (call,) = graph.find_nodes(op="call_module", target="block")
    (routed,) = graph.find_nodes(op="call_module", target="router")
    inputs = graph.find_nodes(op="placeholder")
    with graph.inserting_after(inputs[-1]):
        least_score = graph.placeholder("least_score")
    with graph.inserting_after(least_score):
        token_mask = graph.placeholder("token_mask")
    with graph.inserting_before(call):
        decision = graph.call_module("decide", (*routed.args, least_score, token_mask))
        is_open, routing_mask = getitems(decision, 2)
    call.args = (*call.args[:-1], is_open)
    graph.output((*outputs, routing_mask))
    eliminate_dead_code(graph)
    mixed = soft.get_submodule("block")
    assert isinstance(mixed, fx.GraphModule)
    masked = map_blocks(mixed, lambda block: masked_block(inner_block(block), skip_of(block)))
    return LazyGraphModule({"decide": _decide(score), "block": masked}, graph)


def _decide(score: nn.Module) -> fx.GraphModule:
    graph = fx.Graph()
    inputs = map(graph.placeholder, ("router_input", "least_score", "token_mask"))
    router_input, least_score, token_mask = inputs
    is_open = graph.call_function(operator.gt, (graph.call_module("score", (router_input,)), least_score))
    graph.output((is_open, graph.call_function(operator.and_, (is_open, token_mask))))
    return LazyGraphModule({"score": score}, graph)
