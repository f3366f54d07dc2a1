"""What the routers of precisions pick in each block, as stacked bars."""

from collections.abc import Mapping, Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator


def draw_choices(axes: Axes, shares: Sequence[Mapping[int, float]]) -> None:
    """Draw a bar for each block, from its shares of tokens by their bits, 0 where it was skipped."""
    layers = range(len(shares))
    used = sorted({bits for by_bits in shares for bits in by_bits})
    bottom = [0.0] * len(layers)
    for bits, color in zip(used, _colors(len(used)), strict=True):
        heights = [by_bits.get(bits, 0.0) for by_bits in shares]
        axes.bar(layers, heights, bottom=bottom, color=color, label=f"{bits} bits" if bits else "skipped")
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    axes.set_xlabel("block")
    axes.set_ylabel("share of tokens, by the router's choice")
    axes.set_ylim(0, 1)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    # Above the bars, which leave no room.
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(used), frameon=False)


def _colors(count: int) -> list[tuple[float, float, float, float]]:
    """From light to dark."""
    blues = matplotlib.colormaps["Blues"]
    return [blues(0.3 + 0.6 * index / max(count - 1, 1)) for index in range(count)]
