"""The plots of a training: what it reached step by step, and what its routers of precisions pick in the end."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from modcompile.choices_plot import draw_choices
from modcompile.objective import DISTILL_LOSS, LM_LOSS, Budget
from modcompile.png_files import write_png

HISTORY_PLOT = "training_history.png"
CHOICES_PLOT = "training_choices.png"
_DPI = 120


def plot_training(
    history: Sequence[Mapping[str, Any]],
    budgets: Sequence[Budget],
    shares: Sequence[Mapping[int, float]],
    folder: Path,
) -> None:
    """Write both plots into a folder; without `shares`, the history alone.

    Raises:
        OutputError: one can't be written; what was there before still is.
    """
    write_png(draw_history(history, budgets), folder / HISTORY_PLOT)
    if shares:
        write_png(draw_training_choices(shares), folder / CHOICES_PLOT)


def draw_history(history: Sequence[Mapping[str, Any]], budgets: Sequence[Budget]) -> Figure:
    """Losses and what each budget limits, over the steps, from the log history of the HF Trainer.

    Training is a line, each of whose points is the mean since the one before; evaluations are points. What is infinite
    or not a number is left out.
    """
    distills = any(DISTILL_LOSS in line for line in history)
    losses = {LM_LOSS: "LM loss"} | ({DISTILL_LOSS: "KL to the dense model"} if distills else {})
    labels = losses | {budget.name: budget.name.replace("_", " ") for budget in budgets}
    figure = Figure(figsize=(7, 2.5 * len(labels)), dpi=_DPI, layout="constrained")
    panels = figure.subplots(len(labels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (name, label) in zip(panels, labels.items(), strict=True):
        _draw_series(axes, history, name, ".-", "training")
        _draw_series(axes, history, f"eval_{name}", "o", "evaluation")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    for axes, budget in zip(panels[len(losses) :], budgets, strict=True):
        if budget.target:
            axes.axhline(budget.target, color="gray", linestyle="--", label="target")
    for axes in panels:
        axes.legend()
    panels[-1].set_xlabel("step")
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def draw_training_choices(shares: Sequence[Mapping[int, float]]) -> Figure:
    """The choices of every block in the last evaluation."""
    figure = Figure(figsize=(6, 4), dpi=_DPI, layout="constrained")
    draw_choices(figure.subplots(), shares)
    return figure


def _draw_series(axes: Axes, history: Sequence[Mapping[str, Any]], name: str, style: str, label: str) -> None:
    points = [(line["step"], line[name]) for line in history if name in line and math.isfinite(line[name])]
    axes.plot([step for step, _ in points], [value for _, value in points], style, label=label)
