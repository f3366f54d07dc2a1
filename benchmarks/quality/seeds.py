"""Results of seeds that an earlier run has found, so that a run of some need not repeat the others."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def other_seeds(file: Path, how: Mapping[str, Any], seeds: Sequence[int]) -> dict[str, Any]:
    """Those in a file that are not asked for now: none if there is no file, or they were not trained and measured so.

    Args:
        file: what an earlier run has written.
        how: everything that must be the same, of all that such a file has beside `seeds`.
        seeds: those that this run finds by itself.
    """
    if not file.is_file():
        return {}
    earlier: dict[str, Any] = json.loads(file.read_text())
    found: dict[str, Any] = earlier.pop("seeds")
    if earlier != how:
        return {}
    return {seed: points for seed, points in found.items() if int(seed) not in seeds}
