"""Which gates to close for all tokens: what routers have to beat.

Greedy by measured loss: of the gates that are still open, the one whose closing costs least is closed next. That takes
a pass over the text for each of them, so that after the first round only those are tried that were cheapest alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from datasets import Dataset

from modcompile.modeling import RoutedForCausalLM
from modcompile.perplexity import measure

OPEN, CLOSED = 0.0, 2.0
"""Thresholds at which all tokens are executed, and skipped."""


@dataclass(frozen=True)
class StaticSelection:
    """Gates that are closed, by their positions, in the order of closing; and what that costs."""

    closed: tuple[int, ...]
    loss: float
    """On the text that they were selected on, in nats a token."""


def thresholds_of(closed: Sequence[int], gates: int) -> list[float]:
    """The thresholds that close these gates and open the others."""
    return [CLOSED if gate in closed else OPEN for gate in range(gates)]


def select_static(
    model: RoutedForCausalLM, blocks: Dataset, skipped: float, *, candidates: int, batch_size: int = 4
) -> list[StaticSelection]:
    """The selections of 1, 2, … gates, each the one before and a gate more, until about a share `skipped` is closed.

    A gate counts as the work of its layers does, and costs what it adds to the loss for that. In each round after the
    first, the `candidates` open gates are tried that cost least by themselves. The router mode of the model and its
    usage stay as they were.

    Raises:
        DataError: there is no token to predict, or one that the model does not have.
    """
    gates = len(model.gated_layers)
    work = [sum(model.work[layer] for layer in layers) for layers in model.gated_layers]

    def loss_of(closed: tuple[int, ...]) -> float:
        return measure(model, blocks, thresholds_of(closed, gates), batch_size=batch_size).loss

    def cheapest_first(losses: Mapping[int, float], before: float) -> list[int]:
        return sorted(losses, key=lambda gate: (losses[gate] - before) / work[gate])

    alone = {gate: loss_of((gate,)) for gate in range(gates)}
    order = cheapest_first(alone, loss_of(()))
    selections = [StaticSelection((order[0],), alone[order[0]])]
    while len(selections) < gates:
        closed = selections[-1].closed
        if sum(work[gate] for gate in closed) + min(work) / 2 > skipped * sum(work):
            break
        tried = [gate for gate in order if gate not in closed][:candidates]
        losses = {gate: loss_of((*closed, gate)) for gate in tried}
        best = cheapest_first(losses, selections[-1].loss)[0]
        selections.append(StaticSelection((*closed, best), losses[best]))
    return selections
