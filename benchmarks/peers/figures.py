"""Medians and ratios of what rounds found."""

import statistics
from collections.abc import Sequence

from benchmarks.peers.rounds import Rounds

Quartiles = tuple[float, float, float]
"""Lower, median, upper."""


def quartiles(values: Sequence[float]) -> Quartiles:
    """Of one value or more; never outside of them."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return lower, median, upper


def spread_of(rounds: Rounds, figure: str) -> dict[str, Quartiles]:
    """A figure of every case that has it, over rounds."""
    return {name: quartiles([found[figure] for found in taken]) for name, taken in rounds.items() if figure in taken[0]}


def ratios_to(rounds: Rounds, figure: str, other: str) -> dict[str, Quartiles]:
    """The same relative to the case `other`, each ratio taken within a round."""
    against = [found[figure] for found in rounds[other]]
    return {
        name: quartiles([found[figure] / base for found, base in zip(taken, against, strict=True)])
        for name, taken in rounds.items()
        if figure in taken[0]
    }
