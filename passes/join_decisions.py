"""Decide at once the gates that read the same hidden state.

Before, in a lowered graph, where two gates read the hidden state in front of the first::

    token_mask, least_score_0, least_score_1 = routing_inputs(…)
    hidden_1, …, routing_mask_0 = blocks.0(hidden_0, …, hidden_0, least_score_0, token_mask)
    hidden_2, …, routing_mask_1 = blocks.1(hidden_1, …, hidden_0, least_score_1, token_mask)

    blocks.i:  open, routing_mask, needed = decide(router_input, least_score, token_mask)
               hidden, … = cond(needed, …)

After::

    token_mask, least_scores = routing_inputs(…)                                                  # [B, T, 2]
    open_0, routing_mask_0, needed_0, open_1, … = decisions.0,1(hidden_0, least_scores, token_mask)
    hidden_1, …, routing_mask_0 = blocks.0(hidden_0, …, open_0, routing_mask_0, needed_0)
    hidden_2, …, routing_mask_1 = blocks.1(hidden_1, …, open_1, routing_mask_1, needed_1)

    decisions.0,1:  open = scores(hidden) > least_scores;  routing_mask = open & token_mask       # [B, T, 2]
                    needed = any(open) of all tokens                                              # [2]
    blocks.i:       hidden, … = cond(needed, …)

Where blocks have an unmasked branch (`add_unmasked_branch`), it is `all_open` in the place of `needed`.

On a small model what a gate costs is its number of operators, and N gates then have those of one, and two splits.
Whose scores can't be joined (`join_scores`), and who has no other to be joined with, stays as it is.
"""

import operator
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import fx, nn

from modcompile.joined_scores import join_scores
from modcompile.layer_ranges import name_of
from modcompile.passes.eliminate_dead_code import eliminate_dead_code
from modcompile.passes.extract_subgraph import get_attribute
from modcompile.passes.graph_calls import append_placeholders
from modcompile.passes.harden_gates import RoutingInputs
from modcompile.passes.lazy_graph_module import LazyGraphModule
from modcompile.passes.outlined_form import (
    called_modules,
    copy_graph,
    getitems,
    layers_called,
    lowered_calls,
    results,
)

DECISIONS = "decisions."
"""Before the layers of its gates, the name of a decision on several; in ONNX that of its values, too, with a number."""

_DECIDED = ("is_open", "routing_mask", "condition")
NUM_DECIDED = len(_DECIDED)
"""How many values of it belong to each gate, in turn: `is_open`, `routing_mask`, and what its block's `cond` asks."""


class JoinedDecision(nn.Module):
    """Hidden state `[B, T, H]`, least scores `[B, T, N]`, `token_mask [B, T, 1]` → what each gate's `decide` returns.

    That is `is_open [B, T, 1]`, `routing_mask [B, T, 1]`, and whether any token is open, or `of_all` whether all are,
    `[1]`; all of a gate before those of the next.
    """

    def __init__(self, scores: nn.Module, *, of_all: bool) -> None:
        super().__init__()
        self.scores = scores
        self.of_all = of_all

    def forward(
        self, hidden_state: torch.Tensor, least_scores: torch.Tensor, token_mask: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        is_open = self.scores(hidden_state) > least_scores
        condition = is_open.amin((0, 1)) if self.of_all else is_open.amax((0, 1))
        decided = (is_open, is_open & token_mask, condition)
        of_gates = zip(*(values.split(1, dim=-1) for values in decided), strict=True)
        return tuple(value for values in of_gates for value in values)

    def extra_repr(self) -> str:
        return f"of_all={self.of_all}"


def join_decisions(gm: fx.GraphModule) -> fx.GraphModule:
    """Return a lowered graph in which gates that read the same hidden state are decided together.

    What is not joined is shared with `gm`; joined routers have weights of their own.

    Keeps equal: every output, but for rounding of the scores.
    """
    graph, outputs = copy_graph(gm)
    graph.output(outputs)
    groups = [list(group) for _, group in groupby(lowered_calls(gm, graph), _router_input)]
    joined = {group[0]: scores for group in groups if (scores := _joined_scores(gm, group)) is not None}
    if not joined:
        return gm
    modules: dict[str, Any] = dict(called_modules(gm))
    modules |= {str(node.target): get_attribute(gm, str(node.target)) for node in graph.find_nodes(op="get_attr")}
    sizes: list[int] = []
    for group in groups:
        if group[0] in joined:
            name = DECISIONS + ",".join(name_of(layers_called(call)) for call in group)
            decide = gm.get_submodule(f"{group[0].target}.decide")
            assert isinstance(decide, fx.GraphModule)
            of_all = bool(decide.graph.find_nodes(op="call_function", target=torch.all))
            modules[name] = JoinedDecision(joined[group[0]], of_all=of_all)
            _decide_at_once(group, name, 1 + len(sizes))
            modules |= {str(call.target): _told_what_is_decided(modules[str(call.target)]) for call in group}
            sizes.append(len(group))
        else:
            for call in group:
                _, least_score, _ = _gate_inputs(call)
                least_score.args = (least_score.args[0], 1 + len(sizes))
                sizes.append(1)
    modules["routing_inputs"] = RoutingInputs(gm.get_submodule("routing_inputs").parameters(), sizes)
    eliminate_dead_code(graph)
    graph.lint()
    return LazyGraphModule(modules, graph)


def _gate_inputs(call: fx.Node) -> list[fx.Node]:
    """What a gate is decided by, behind what its block takes: as many values as its decision has."""
    return [value for value in call.args[-NUM_DECIDED:] if isinstance(value, fx.Node)]


def _router_input(call: fx.Node) -> fx.Node:
    return _gate_inputs(call)[0]


def _joined_scores(gm: fx.GraphModule, group: Sequence[fx.Node]) -> nn.Module | None:
    scores = [gm.get_submodule(f"{call.target}.decide.score") for call in group]
    return join_scores(scores) if len(group) > 1 else None


def _decide_at_once(group: Sequence[fx.Node], name: str, position: int) -> None:
    """Insert a call of the decision `name`, which takes the `routing_inputs` at `position`, and tell the blocks."""
    graph = group[0].graph
    router_input, least_score, token_mask = _gate_inputs(group[0])
    with graph.inserting_before(group[0]):
        least_scores = graph.call_function(operator.getitem, (least_score.args[0], position))
        decision = graph.call_module(name, (router_input, least_scores, token_mask))
        values = getitems(decision, NUM_DECIDED * len(group))
    for index, call in enumerate(group):
        decided = values[index * NUM_DECIDED :][:NUM_DECIDED]
        call.args = (*call.args[:-NUM_DECIDED], *decided)


def _told_what_is_decided(block: fx.GraphModule) -> fx.GraphModule:
    """The lowered block without its decision, the values of which it takes in the place of what they are made of."""
    graph, outputs = copy_graph(block)
    graph.output(outputs)
    (decide,) = graph.find_nodes(op="call_module", target="decide")
    made_of = decide.all_input_nodes
    for value, decided in zip(results(decide), append_placeholders(graph, _DECIDED), strict=True):
        value.replace_all_uses_with(decided)
        graph.erase_node(value)
    for node in (decide, *made_of):
        graph.erase_node(node)
    return LazyGraphModule(block, graph)
