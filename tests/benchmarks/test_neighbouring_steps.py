import shutil
from pathlib import Path

import pytest

from benchmarks.neighbouring_steps import Neighbours, compare_steps, step_in_turn
from modcompile.export.session import MODEL_FILE


def test_quartiles_are_of_the_ratios() -> None:
    assert Neighbours((3.0,) * 3, (1.0, 1.25, 1.5)).quartiles() == (1.0, 1.25, 1.5)


@pytest.mark.slow
def test_steps_of_the_first_are_what_others_are_compared_with(onnx_folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(onnx_folder, tmp_path / "copy")
    files = [onnx_folder / MODEL_FILE, copy / MODEL_FILE]
    (first, one), (second, ratio) = step_in_turn(files, 4, 8, 1, 0)
    assert one == 1
    assert first > 0
    assert second > 0
    assert ratio > 0


@pytest.mark.slow
def test_every_process_is_told(onnx_folder: Path) -> None:
    measured = compare_steps({"dense": onnx_folder / MODEL_FILE}, 4, 5, threads=1, processes=2)
    assert measured["dense"].ratios == (1.0, 1.0)
    assert len(set(measured["dense"].milliseconds)) == 2
