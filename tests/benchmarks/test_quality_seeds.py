import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.quality.seeds import kept_seeds

RECIPES = {"routed": {"routed": "--price 1"}, "static": {"static-0.9": "--ratio 0.9"}}
HOW: dict[str, Any] = {"steps": 70, "texts": {"prose": "a digest"}, "recipes": RECIPES}
SEEDS: dict[str, Any] = {
    "0": {"minutes": 9.0, "points": {"routed": {"prose": [1]}, "static": {"prose": [2]}}},
    "1": {"minutes": 10.0, "points": {"routed": {"prose": [3]}}},
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "quality.json"
    path.write_text(json.dumps(HOW | {"seeds": SEEDS}))
    return path


def test_keeps_what_is_not_asked_for_again(file: Path) -> None:
    every = ["routed", "static"]
    assert kept_seeds(file, HOW, [2], every) == SEEDS | {"2": {}}
    found = kept_seeds(file, HOW, [1, 2], every)
    assert found["0"] == SEEDS["0"]
    assert found["1"]["points"] == found["2"] == {}
    found = kept_seeds(file, HOW, [0], ["routed"])
    assert found["0"] == {"minutes": 9.0, "points": {"static": {"prose": [2]}}}
    assert found["1"] == SEEDS["1"]


@pytest.mark.parametrize("other", [{"steps": 71}, {"texts": {"prose": "another"}}, {"windows": 4}])
def test_keeps_nothing_that_was_found_in_another_way(file: Path, other: dict[str, Any]) -> None:
    assert kept_seeds(file, HOW | other, [2], ["routed"]) == {"2": {}}


def test_keeps_ways_whose_recipe_is_the_same(file: Path) -> None:
    other = {"recipes": RECIPES | {"routed": {"routed": "--price 2"}}}
    assert kept_seeds(file, HOW | other, [2], ["routed"]) == {"0": {"points": {"static": {"prose": [2]}}}, "2": {}}
    other = {"recipes": RECIPES | {"static": {"static-0.9": "--ratio 0.8"}}}
    found = kept_seeds(file, HOW | other, [2], ["routed"])
    assert found["0"] == {"minutes": 9.0, "points": {"routed": {"prose": [1]}}}
    assert found["1"] == SEEDS["1"]


def test_keeps_nothing_where_there_is_nothing(tmp_path: Path) -> None:
    assert kept_seeds(tmp_path / "quality.json", HOW, [2], ["routed"]) == {"2": {}}
