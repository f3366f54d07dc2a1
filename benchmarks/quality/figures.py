"""What routers lose beside what a static selection loses: from measured points to numbers that can be compared."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Point:
    """A way of skipping, measured on a text."""

    work: float
    """Share of the work of all blocks that was done."""
    perplexity: float
    """Against that of the dense model."""


DENSE = Point(1.0, 1.0)

_BEYOND = 0.005
"""Of the work: how far the last line is drawn on. Static selections of halves of blocks can't meet every share."""


def perplexity_at(points: Sequence[Point], work: float) -> float | None:
    """Against dense, at a share of the work: on straight lines, in its logarithm, between the points and `DENSE`.

    None below the least work that was measured, but for half a percentage point: nothing is guessed there.
    """
    ordered = sorted([*points, DENSE], key=lambda point: point.work)
    for lower, upper in pairwise(ordered):
        least = lower.work - (_BEYOND if lower is ordered[0] else 0)
        if least <= work <= upper.work:
            share = (work - lower.work) / (upper.work - lower.work) if upper.work > lower.work else 0.0
            logarithm = (1 - share) * math.log(lower.perplexity) + share * math.log(upper.perplexity)
            return math.exp(logarithm)
    return None


def share_of_loss(perplexity: float | None, other: float | None) -> float | None:
    """What one loses, in nats a token, as a share of what another does; None where one of them is not known."""
    if perplexity is None or other is None or other <= 1:
        return None
    return math.log(perplexity) / math.log(other)


def told(values: Sequence[float | None]) -> str:
    """Of some seeds: the median, and the range if there is one; a dash where nothing was measured."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    median = f"{statistics.median(known):.2f}"
    return median if len(known) == 1 else f"{median} ({min(known):.2f} to {max(known):.2f})"
