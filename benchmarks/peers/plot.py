"""The speeds as bars."""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.peers.figures import Quartiles, spread_of
from modcompile.png_files import write_png

_OURS, _PEER = "#2b6cb0", "#a0aec0"


def plot(result: dict[str, Any], path: Path) -> None:
    """Write a PNG of decoding and prefilling: bars are medians, lines on them the middle half.

    Raises:
        OutputError: it can't be written; what was there before still is.
    """
    rounds, counts = result["rounds"], result["tokens"]
    panels = {
        "decode": f"decode after {counts['prompt']}",
        "prefill_long": f"prefill of {counts['long_prompt']}",
        "decode_context": f"decode after {counts['context']}",
    }
    found = {title: spread_of(rounds, figure) for figure, title in panels.items()}
    drawn = {title: values for title, values in found.items() if values}
    figure = Figure(figsize=(4.2 * len(drawn) + 1.5, 0.38 * len(rounds) + 1.2), dpi=120, layout="constrained")
    row = figure.subplots(1, len(drawn), sharey=True, squeeze=False)[0]
    for axes, (title, values) in zip(row, drawn.items(), strict=True):
        _draw(axes, list(rounds), values, result["peers"])
        axes.set_title(title)
    write_png(figure, path)


def _draw(axes: Axes, names: list[str], values: dict[str, Quartiles], peers: list[str]) -> None:
    places = [place for place, name in enumerate(names) if name in values]
    kept = [values[names[place]] for place in places]
    middle = [median for _, median, _ in kept]
    reach = [
        [median - lower for lower, median, _ in kept],
        [upper - median for _, median, upper in kept],
    ]
    colors = [_PEER if names[place] in peers else _OURS for place in places]
    axes.barh(places, middle, xerr=reach, color=colors, capsize=3)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlabel("tokens/s")
    axes.grid(axis="x", alpha=0.3)
