"""Bits for each layer, chosen once for all inputs by what each layer's bits cost.

A layer's cost is what the loss rises by when that layer alone has fewer bits. Taking it that costs add up, the best
allocations lie on the lower convex hulls of the layers' costs over their bits, and a walk along these, from the
cheapest slope to the steepest, finds them one after another.
"""

from collections.abc import Callable, Sequence

Allocation = tuple[int, ...]
"""The bits of each layer."""

_TOLERANCE = 1e-6  # bits; an average of shares is only as exact as floating-point numbers


Sensitivity = list[dict[int, float]]
"""For each layer, by what the loss rises when it alone has fewer bits: by its bits, the most first, which cost 0."""


def measure_sensitivity(
    loss_of: Callable[[list[int]], float], num_layers: int, precisions: Sequence[int]
) -> Sensitivity:
    """Measure L · (P - 1) + 1 losses: all layers at the highest precision, then one at a time at each lower one."""
    highest, *lower = sorted(precisions, reverse=True)
    full = [highest] * num_layers
    least = loss_of(full)
    return [
        {highest: 0.0} | {bits: loss_of([*full[:layer], bits, *full[layer + 1 :]]) - least for bits in lower}
        for layer in range(num_layers)
    ]


def greedy_allocations(sensitivity: Sensitivity) -> list[Allocation]:
    """Allocations from all layers at the most bits to all at the fewest.

    Each step lowers the one layer whose loss rises least for a bit saved; a precision above the line between its
    neighbours is jumped over. Of all allocations with as many bits, none has a smaller sum of increases.
    """
    paths = [_lower_hull(by_bits) for by_bits in sensitivity]
    at = [0] * len(paths)
    allocations = [tuple(path[0] for path in paths)]
    while unfinished := [layer for layer, path in enumerate(paths) if at[layer] + 1 < len(path)]:

        def slope(layer: int) -> float:
            return _slope(sensitivity[layer], paths[layer][at[layer]], paths[layer][at[layer] + 1])

        at[min(unfinished, key=slope)] += 1
        allocations.append(tuple(path[index] for path, index in zip(paths, at, strict=True)))
    return allocations


def allocation_at(allocations: Sequence[Allocation], average_bits: float) -> Allocation | None:
    """The allocation with the most bits that has at most so many on average; None where all have more."""
    fitting = [bits for bits in allocations if sum(bits) <= (average_bits + _TOLERANCE) * len(bits)]
    return max(fitting, key=sum, default=None)


def _lower_hull(increases: dict[int, float]) -> list[int]:
    """The bits, the most first, between which slopes never fall."""
    hull: list[int] = []
    for bits in sorted(increases, reverse=True):
        while len(hull) > 1 and _slope(increases, hull[-2], hull[-1]) > _slope(increases, hull[-1], bits):
            hull.pop()
        hull.append(bits)
    return hull


def _slope(increases: dict[int, float], bits: int, fewer: int) -> float:
    """By how much the loss rises for a bit saved."""
    return (increases[fewer] - increases[bits]) / (bits - fewer)
