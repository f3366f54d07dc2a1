from pathlib import Path
from typing import Any

import matplotlib.image
import pytest

from benchmarks.quality.plot import plot
from benchmarks.quality.recipes import ORIGINAL, RANDOM, ROUTED, SEARCHED, STATIC
from benchmarks.quality.table import tables


def _points(*pairs: tuple[float, float]) -> list[dict[str, float]]:
    return [{"target": work, "work": work, "perplexity": perplexity} for work, perplexity in pairs]


def _beside(work: float, perplexity: float, moved: float) -> dict[str, float]:
    """At thresholds that are not those for a target, 0.8, but near them."""
    return {"target": 0.8, "work": work, "perplexity": perplexity, "moved": moved}


@pytest.fixture
def result() -> dict[str, Any]:
    """Of two seeds, on one text; only the first has been compared with anything."""
    first = {
        ROUTED: {"prose": _points((0.9, 1.1), (0.8, 1.21))},
        SEARCHED: {"prose": [*_points((0.9, 1.05), (0.79, 1.15)), _beside(0.8, 1.1, -0.3), _beside(0.7, 1.2, 0.3)]},
        RANDOM: {"prose": _points((0.9, 3.0), (0.8, 9.0))},
        STATIC: {"prose": _points((0.8, 1.4641))},
        ORIGINAL: {"prose": _points((1.0, 0.95))},
    }
    second = {ROUTED: {"prose": _points((0.9, 1.3), (0.8, 1.69))}}
    return {
        "model": "a-model",
        "steps": 70,
        "windows": 4,
        "window": 512,
        "texts": {"prose": "a digest"},
        "targets": [0.9, 0.8],
        "searched_targets": [0.9, 0.8],
        "seeds": {
            "0": {"points": first, "minutes": 12.0, "trainable_share": 0.009},
            "1": {"points": second, "minutes": 14.0, "trainable_share": 0.009},
            "2": {},
        },
    }


def _rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def test_tells_all_ways_at_the_same_work(result: dict[str, Any]) -> None:
    text = tables(result, (0.9, 0.8, 0.5))
    assert "The original's recipe" in text
    rows = _rows(text)
    assert ["prose", ROUTED, "1.20 (1.10 to 1.30)", "1.45 (1.21 to 1.69)", "-"] in rows
    assert ["prose", STATIC, "1.21", "1.46", "-"] in rows
    assert ["prose", RANDOM, "3.00", "9.00", "-"] in rows
    assert ["prose", SEARCHED, "1.05", "1.10", "-"] in rows
    assert ["prose", f"{SEARCHED}: loss, as a share of static's", "0.26", "0.25", "-"] in rows
    assert ["prose", "0.90", "0.79"] in rows, "not those beside"
    assert ["prose", "routed: loss, as a share of static's", "0.50", "0.50", "-"] in rows
    assert ["prose", "1.00", "0.95"] in rows
    assert ["prose", "0.90 (0.90 to 0.90)", "0.80 (0.80 to 0.80)"] in rows


def test_tells_the_cost(result: dict[str, Any]) -> None:
    text = tables(result, (0.9,))
    assert "0.90 (0.90 to 0.90) % of the parameters" in text
    assert "13.00 (12.00 to 14.00) minutes" in text


def test_tells_what_there_is_of_a_run_that_goes_on(result: dict[str, Any]) -> None:
    del result["seeds"]["1"]
    for way in (SEARCHED, RANDOM, STATIC, ORIGINAL):
        del result["seeds"]["0"]["points"][way]
    text = tables(result, (0.9,))
    assert "The original's recipe" not in text
    assert "searched" not in text
    rows = _rows(text)
    assert ["prose", ROUTED, "1.10"] in rows
    assert not any(STATIC in row or RANDOM in row or "routed: loss, as a share of static's" in row for row in rows)


def test_pairs_are_of_one_seed(result: dict[str, Any]) -> None:
    """The second seed's static selection is not compared with the first one's routers."""
    points = result["seeds"]["0"]["points"]
    result["seeds"]["1"]["points"][STATIC] = points.pop(STATIC)
    assert ["prose", "routed: loss, as a share of static's", "1.38", "1.38"] in _rows(tables(result, (0.9, 0.8)))
    del points[ROUTED]  # is being trained again
    assert ["prose", ROUTED, "1.30"] in _rows(tables(result, (0.9,)))


def test_tells_of_static_selections_alone(result: dict[str, Any], tmp_path: Path) -> None:
    for seed in ("0", "1"):
        del result["seeds"][seed]["points"][ROUTED]
        result["seeds"][seed]["points"].pop(SEARCHED, None)
    assert ["prose", STATIC, "1.21"] in _rows(tables(result, (0.9,)))
    plot(result, tmp_path / "quality.png")
    assert (tmp_path / "quality.png").is_file()


@pytest.mark.parametrize("texts", [1, 2])
def test_plot_has_a_panel_for_each_text(result: dict[str, Any], tmp_path: Path, texts: int) -> None:
    result["texts"] |= {f"text {number}": "a digest" for number in range(1, texts)}
    for seed in ("0", "1"):
        for points in result["seeds"][seed]["points"].values():
            points |= {f"text {number}": points["prose"] for number in range(1, texts)}
    plot(result, tmp_path / "quality.png")
    height, width, _ = matplotlib.image.imread(tmp_path / "quality.png").shape
    assert width == texts * 480
    assert height > 400
