import json
import math
from pathlib import Path
from typing import Any

import pytest

from modcompile.calibrated_thresholds import (
    CalibratedThresholds,
    calibrated_for,
    check_hard_threshold,
    parse_threshold,
    read_thresholds,
    threshold_for,
    write_thresholds,
)
from modcompile.errors import ArtifactError, ConfigError

FOUND = [
    CalibratedThresholds(0.9, (0.25, 0.5), 0.898, "per_layer"),
    CalibratedThresholds(0.8, (0.75, 0.75), 0.803, "global"),
]


def test_reads_what_was_written(tmp_path: Path) -> None:
    write_thresholds(FOUND, tmp_path)
    assert read_thresholds(tmp_path) == FOUND


@pytest.mark.parametrize(
    ("hard_threshold", "expected"),
    [(0.3, 0.3), ("auto", [0.25, 0.5]), ("auto:0.9", [0.25, 0.5]), ("auto:0.8", [0.75, 0.75])],
)
def test_auto_is_the_first_budget_or_the_one_named(tmp_path: Path, hard_threshold: Any, expected: Any) -> None:
    write_thresholds(FOUND, tmp_path)
    assert threshold_for(tmp_path, hard_threshold) == expected


@pytest.mark.parametrize("hard_threshold", ["0.5", "atuo", "auto:x", -1.0])
def test_nothing_else_is_a_threshold(tmp_path: Path, hard_threshold: Any) -> None:
    write_thresholds(FOUND, tmp_path)
    with pytest.raises(ConfigError, match="--hard_threshold is "):
        threshold_for(tmp_path, hard_threshold)


def test_names_the_budgets_that_there_are(tmp_path: Path) -> None:
    write_thresholds(FOUND, tmp_path)
    with pytest.raises(ConfigError, match=r"has thresholds for 0\.9 0\.8, none for 0\.7; give modcompile.calibrate "):
        threshold_for(tmp_path, "auto:0.7")


def test_what_an_export_takes_along_is_for_its_gates(tmp_path: Path) -> None:
    assert calibrated_for(tmp_path, 3) == []
    write_thresholds(FOUND, tmp_path)
    gates = len(FOUND[0].thresholds)
    assert calibrated_for(tmp_path, gates) == FOUND
    with pytest.raises(ArtifactError, match=rf"has {gates} thresholds for 9 gates; run modcompile.calibrate again$"):
        calibrated_for(tmp_path, 9)


def test_a_number_needs_no_file(tmp_path: Path) -> None:
    assert threshold_for(tmp_path, 0.5) == 0.5
    with pytest.raises(ArtifactError, match=r"has no thresholds\.json; make it with python -m modcompile\.calibrate "):
        threshold_for(tmp_path, "auto")


@pytest.mark.parametrize(
    "damage",
    [
        lambda stored: stored.pop("calibrated"),
        lambda stored: stored["calibrated"][0].pop("scope"),
        lambda stored: stored["calibrated"][0].update(thresholds=[0.5, -1.0]),
        lambda stored: stored["calibrated"][0].update(thresholds=0.5),
        lambda stored: stored.update(format_version=9),
    ],
)
def test_names_a_damaged_file(tmp_path: Path, damage: Any) -> None:
    write_thresholds(FOUND, tmp_path)
    path = tmp_path / "thresholds.json"
    stored = json.loads(path.read_text())
    damage(stored)
    path.write_text(json.dumps(stored))
    with pytest.raises(ArtifactError, match=r"thresholds\.json .*run modcompile\.calibrate again"):
        read_thresholds(tmp_path)


@pytest.mark.parametrize(
    ("text", "value"), [("0.5", 0.5), ("2", 2.0), ("auto", "auto"), ("auto:0.80", "auto:0.8"), ("auto:1", "auto:1")]
)
def test_parses_numbers_and_budgets(text: str, value: float | str) -> None:
    assert parse_threshold(text) == value
    check_hard_threshold(value)


@pytest.mark.parametrize("text", ["automatic", "auto:x", "half", ""])
def test_refuses_other_words(text: str) -> None:
    with pytest.raises(ValueError, match="could not convert"):
        parse_threshold(text)
    with pytest.raises(ConfigError, match=r"^--hard_threshold is .*; it must be a number, auto, or auto:0\.8"):
        check_hard_threshold(text)


@pytest.mark.parametrize("value", [-0.1, math.nan, "0.5"])
def test_refuses_what_is_no_threshold(value: float | str) -> None:
    with pytest.raises(ConfigError, match=r"^--hard_threshold is "):
        check_hard_threshold(value)
