"""The trade-off as curves, a panel for each text."""

import math
import statistics
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.quality.figures import DENSE, Point
from benchmarks.quality.recipes import ORIGINAL, RANDOM, ROUTED, SEARCHED, STATIC
from benchmarks.quality.table import points_of
from modcompile.png_files import write_png

_STYLES = {
    ROUTED: ("o-", "#2b6cb0"),
    SEARCHED: ("o--", "#2c7a7b"),
    STATIC: ("s-", "#dd6b20"),
    RANDOM: ("x:", "#a0aec0"),
    ORIGINAL: ("^", "#9b2c2c"),
}
_MOST = 4.0


def plot(result: dict[str, Any], path: Path) -> None:
    """Write a PNG: lines through the medians of the seeds, and every seed's points.

    Raises:
        OutputError: it can't be written; what was there before still is.
    """
    texts = list(result["texts"])
    figure = Figure(figsize=(4 * len(texts), 3.8), dpi=120, layout="constrained")
    row = figure.subplots(1, len(texts), sharey=True, squeeze=False)[0]
    for axes, text in zip(row, texts, strict=True):
        for way, (style, color) in _STYLES.items():
            _draw(axes, way, points_of(result, way, text), style, color)
        axes.set_title(text)
        axes.set_xlim(1.0, min(result["targets"]) - 0.02)
        axes.set_ylim(0.98, _MOST)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:.2g} x")
        axes.yaxis.set_minor_formatter("{x:.2g} x")
        axes.grid(alpha=0.3, which="both")
        axes.set_xlabel("share of the work of all blocks")
    row[0].set_ylabel("perplexity against dense")
    row[-1].legend()
    write_png(figure, path)


def _draw(axes: Axes, way: str, seeds: list[list[Point]], style: str, color: str) -> None:
    if not seeds:
        return
    longest = max(map(len, seeds))
    whole = [seed for seed in seeds if len(seed) == longest]
    line = [] if way == ORIGINAL else [DENSE]
    line += [_median(points) for points in zip(*whole, strict=True)]
    line = sorted((point for point in line if math.isfinite(point.perplexity)), key=lambda point: -point.work)
    axes.plot([each.work for each in line], [each.perplexity for each in line], style, color=color, label=way)
    spread = [point for seed in seeds for point in seed]
    axes.plot([each.work for each in spread], [each.perplexity for each in spread], ".", color=color, alpha=0.5, ms=4)


def _median(points: tuple[Point, ...]) -> Point:
    works, perplexities = [point.work for point in points], [point.perplexity for point in points]
    return Point(statistics.median(works), statistics.median(perplexities))
