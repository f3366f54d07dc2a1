"""The plot of an evaluation: perplexity against bits, and what the routers pick in each block."""

import math
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from modcompile.durable_files import replace_file
from modcompile.precision_evaluation import PrecisionEvaluation, PrecisionMeasurement

_LOG_SPAN = 3.0
"""How many times the least perplexity the greatest must be for a logarithmic axis."""


def plot_precisions(evaluation: PrecisionEvaluation, path: Path) -> None:
    """Write a PNG; perplexities that are infinite or not a number are left out.

    Raises:
        OutputError: it can't be written; what was there before still is.
    """
    figure = draw_precisions(evaluation)
    replace_file(path, lambda staging: FigureCanvasAgg(figure).print_png(staging))


def draw_precisions(evaluation: PrecisionEvaluation) -> Figure:
    """The two panels side by side."""
    figure = Figure(figsize=(11, 4), dpi=120, layout="constrained")
    quality, choices = figure.subplots(1, 2)
    _draw_quality(quality, evaluation)
    _draw_choices(choices, evaluation.router)
    return figure


def _draw_quality(axes: Axes, evaluation: PrecisionEvaluation) -> None:
    series = {
        "best static allocation": (list(evaluation.static.values()), ".-", 6),
        "fixed precision": (list(evaluation.fixed.values()), "s", 6),
        "router": ([evaluation.router], "*", 14),
    }
    drawn: list[float] = []
    for name, (measured, style, size) in series.items():
        finite = [point for point in measured if math.isfinite(point.perplexity)]
        bits, perplexities = [point.average_bits for point in finite], [point.perplexity for point in finite]
        axes.plot(bits, perplexities, style, markersize=size, label=name)
        drawn += perplexities
    if drawn and max(drawn) > _LOG_SPAN * min(drawn):
        axes.set_yscale("log")
    axes.set_xlabel("average bits of a weight")
    axes.set_ylabel("perplexity")
    axes.grid(alpha=0.3)
    axes.legend()


def _draw_choices(axes: Axes, router: PrecisionMeasurement) -> None:
    layers = range(len(router.shares))
    used = sorted({bits for by_bits in router.shares for bits in by_bits})
    bottom = [0.0] * len(layers)
    for bits, color in zip(used, _colors(len(used)), strict=True):
        heights = [by_bits.get(bits, 0.0) for by_bits in router.shares]
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
