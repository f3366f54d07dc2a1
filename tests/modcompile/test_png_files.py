import os
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from modcompile.errors import OutputError
from modcompile.png_files import write_png


def _figure() -> Figure:
    figure = Figure(figsize=(3, 2), dpi=100)
    figure.subplots().plot([0, 1], [1, 0], color="red")
    return figure


def test_writes_a_png_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "plot.png"
    path.write_text("older")
    write_png(_figure(), path)
    assert list(tmp_path.iterdir()) == [path]
    pixels = imread(path)
    assert pixels.shape == (200, 300, 4)
    assert (pixels == np.array([1, 0, 0, 1])).all(-1).any()
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()


def test_a_place_that_can_not_be_written_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="can't be written"):
        write_png(_figure(), tmp_path / "missing" / "plot.png")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
