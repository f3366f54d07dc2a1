import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.quality.seeds import other_seeds

HOW: dict[str, Any] = {"steps": 70, "texts": {"prose": "a digest"}}
SEEDS = {"0": {"minutes": 9.0}, "1": {"minutes": 10.0}}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "quality.json"
    path.write_text(json.dumps(HOW | {"seeds": SEEDS}))
    return path


def test_keeps_what_is_not_asked_for_again(file: Path) -> None:
    assert other_seeds(file, HOW, [2]) == SEEDS
    assert other_seeds(file, HOW, [1, 2]) == {"0": SEEDS["0"]}
    assert other_seeds(file, HOW, [0, 1]) == {}


@pytest.mark.parametrize("other", [{"steps": 71}, {"texts": {"prose": "another"}}, {"windows": 4}])
def test_keeps_nothing_that_was_found_in_another_way(file: Path, other: dict[str, Any]) -> None:
    assert other_seeds(file, HOW | other, [2]) == {}


def test_keeps_nothing_where_there_is_nothing(tmp_path: Path) -> None:
    assert other_seeds(tmp_path / "quality.json", HOW, [2]) == {}
