"""Figures as files, drawn without a screen."""

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from modcompile.durable_files import replace_file


def write_png(figure: Figure, path: Path) -> None:
    """Write or replace a PNG, in one step.

    Raises:
        OutputError: it can't be written; what was there before still is.
    """
    replace_file(path, lambda staging: FigureCanvasAgg(figure).print_png(staging))
