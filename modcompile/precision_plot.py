"""The plot of an evaluation: perplexity against bits, and what the routers pick in each block."""

import math
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from modcompile.choices_plot import draw_choices
from modcompile.png_files import write_png
from modcompile.precision_evaluation import PrecisionEvaluation

_LOG_SPAN = 3.0
"""How many times the least perplexity the greatest must be for a logarithmic axis."""


def plot_precisions(evaluation: PrecisionEvaluation, path: Path) -> None:
    """Write a PNG; perplexities that are infinite or not a number are left out.

    Raises:
        OutputError: it can't be written; what was there before still is.
    """
    write_png(draw_precisions(evaluation), path)


def draw_precisions(evaluation: PrecisionEvaluation) -> Figure:
    """The two panels side by side."""
    figure = Figure(figsize=(11, 4), dpi=120, layout="constrained")
    quality, choices = figure.subplots(1, 2)
    _draw_quality(quality, evaluation)
    draw_choices(choices, evaluation.router.shares)
    return figure


def _draw_quality(axes: Axes, evaluation: PrecisionEvaluation) -> None:
    series = {
        "best static allocation": (list(evaluation.static.values()), ".-", 6),
        "fixed precision": (list(evaluation.fixed.values()), "s", 6),
        "\n".join(["router", *evaluation.caveats]): ([evaluation.router], "*", 14),
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
