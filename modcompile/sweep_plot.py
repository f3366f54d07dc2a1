"""The plot of a sweep: each way of skipping's perplexity against the dense model's, over the share of the work."""

import math
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from modcompile.depth_sweep import DENSE, RANDOM, ROUTER, STATIC, STATIC_ALONE, Sweep
from modcompile.png_files import write_png

_STYLES = {ROUTER: "o-", STATIC: "s-", STATIC_ALONE: "s:", RANDOM: "x--"}


def plot_sweep(sweep: Sweep, path: Path) -> None:
    """Write a PNG; perplexities that are infinite or not a number are left out.

    Raises:
        OutputError: it can't be written; what was there before still is.
    """
    write_png(draw_sweep(sweep), path)


def draw_sweep(sweep: Sweep) -> Figure:
    """One line for each way of skipping, all from the dense model on; a point for each folder beside them.

    And over tokens a second, where these were measured.
    """
    figure = Figure(figsize=(12 if sweep.speeds else 7, 4.5), dpi=120, layout="constrained")
    axes, *others = figure.subplots(1, 2 if sweep.speeds else 1, squeeze=False)[0]
    for speeds in others:
        _draw_speeds(sweep, speeds)
    for name, points in sweep.ways.items():
        times = [(point.block_work, point.perplexity / sweep.dense.perplexity) for point in points]
        finite = [pair for pair in times if math.isfinite(pair[1])]
        if name in _STYLES:
            finite.insert(0, (1.0, 1.0))
        axes.plot([share for share, _ in finite], [time for _, time in finite], _STYLES.get(name, "^"), label=name)
    axes.invert_xaxis()
    axes.set_xlabel("share of the work of all blocks that is done")
    _finish(axes)
    return figure


def _draw_speeds(sweep: Sweep, axes: Axes) -> None:
    (dense,) = sweep.speeds[DENSE]
    for name in sweep.thresholds:
        times = [point.perplexity / sweep.dense.perplexity for point in sweep.ways[name]]
        pairs = [(dense, 1.0), *zip(sweep.speeds[name], times, strict=True)]
        finite = [pair for pair in pairs if math.isfinite(pair[1])]
        axes.plot([speed for speed, _ in finite], [time for _, time in finite], _STYLES[name], label=name)
    axes.set_xlabel("tokens a second, decoding one row in ONNX Runtime")
    _finish(axes)


def _finish(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:.2g} x")
    axes.yaxis.set_minor_formatter("{x:.2g} x")
    axes.set_ylabel("perplexity against dense")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
