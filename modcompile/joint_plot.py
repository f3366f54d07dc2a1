"""The plot of a joint sweep: perplexity over the bytes of weights that a token reads."""

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from modcompile.joint_sweep import BOTH, DEPTH, PRECISION, JointPoint, frontier
from modcompile.png_files import write_png

_STYLES = {DEPTH: ("s", "#dd6b20"), PRECISION: ("^", "#2f855a"), BOTH: (".", "#2b6cb0")}


def plot_jointly(points: Sequence[JointPoint], path: Path) -> None:
    """Write a PNG; perplexities that are infinite or not a number are left out.

    Raises:
        OutputError: it can't be written; what was there before still is.
    """
    write_png(draw_jointly(points), path)


def draw_jointly(points: Sequence[JointPoint]) -> Figure:
    """A mark for each point, by its way, and a line through those that no other beats."""
    figure = Figure(figsize=(7, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    finite = [point for point in points if math.isfinite(point.measured.perplexity)]
    for way, (style, color) in _STYLES.items():
        axes.plot(*_coordinates([each for each in finite if each.way == way]), style, color=color, label=way)
    axes.plot(*_coordinates(frontier(finite)), "-", color="#718096", linewidth=1, zorder=0, label="frontier")
    axes.set_xlabel("MB of weights that a token reads")
    axes.set_ylabel("perplexity")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:.3g}")
    axes.yaxis.set_minor_formatter("{x:.3g}")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    return figure


def _coordinates(points: Sequence[JointPoint]) -> tuple[list[float], list[float]]:
    return [point.bytes_per_token / 1e6 for point in points], [point.measured.perplexity for point in points]
