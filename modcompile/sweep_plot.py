"""The plot of a sweep: each way of skipping's perplexity against the dense model's, over the share of the work."""

import math
from pathlib import Path

from matplotlib.figure import Figure

from modcompile.depth_sweep import RANDOM, ROUTER, STATIC, STATIC_ALONE, Sweep
from modcompile.png_files import write_png

_STYLES = {ROUTER: "o-", STATIC: "s-", STATIC_ALONE: "s:", RANDOM: "x--"}


def plot_sweep(sweep: Sweep, path: Path) -> None:
    """Write a PNG; perplexities that are infinite or not a number are left out.

    Raises:
        OutputError: it can't be written; what was there before still is.
    """
    write_png(draw_sweep(sweep), path)


def draw_sweep(sweep: Sweep) -> Figure:
    """One line for each way of skipping, all from the dense model on; a point for each folder beside them."""
    figure = Figure(figsize=(7, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    for name, points in sweep.ways.items():
        times = [(point.active_ratio, point.perplexity / sweep.dense.perplexity) for point in points]
        finite = [pair for pair in times if math.isfinite(pair[1])]
        if name in _STYLES:
            finite.insert(0, (1.0, 1.0))
        axes.plot([share for share, _ in finite], [time for _, time in finite], _STYLES.get(name, "^"), label=name)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:.2g} x")
    axes.yaxis.set_minor_formatter("{x:.2g} x")
    axes.invert_xaxis()
    axes.set_xlabel("share of (token, layer) pairs that are executed")
    axes.set_ylabel("perplexity against dense")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    return figure
