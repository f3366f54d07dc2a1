"""What an earlier run has found, so that a run of some seeds, or of some ways of skipping, need not repeat the rest."""

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any


def kept_seeds(file: Path, how: Mapping[str, Any], seeds: Sequence[int], ways: Collection[str]) -> dict[str, Any]:
    """By seed, what is not found anew; nothing if there is no file, or what it has was not trained and measured so.

    Args:
        file: what an earlier run has written.
        how: everything that must be the same, of all that such a file has beside `seeds`.
        seeds: those that this run finds something of; each has an entry, which may be empty.
        ways: what it finds of them.
    """
    found: dict[str, Any] = {str(seed): {} for seed in seeds}
    if not file.is_file():
        return found
    earlier: dict[str, Any] = json.loads(file.read_text())
    of_seeds: dict[str, Any] = earlier.pop("seeds")
    if earlier != how:
        return found
    for seed, of_seed in of_seeds.items():
        points = of_seed.get("points", {})
        others = {way: at for way, at in points.items() if int(seed) not in seeds or way not in ways}
        found[seed] = of_seed | ({"points": others} if points else {})
    return found
