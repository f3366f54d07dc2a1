"""What an earlier run has found, so that a run of some seeds, or of some ways of skipping, need not repeat the rest."""

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any


def kept_seeds(file: Path, how: Mapping[str, Any], seeds: Sequence[int], ways: Collection[str]) -> dict[str, Any]:
    """By seed, what is not found anew and was measured alike, of ways that were trained alike; nothing without a file.

    Args:
        file: what an earlier run has written.
        how: everything that must be the same, of all that such a file has beside `seeds`; but for `recipes`, by way, of
            which those that are the same are kept. What a seed has beside its points is of the first of these ways.
        seeds: those that this run finds something of; each has an entry, which may be empty.
        ways: what it finds of them.
    """
    found: dict[str, Any] = {str(seed): {} for seed in seeds}
    if not file.is_file():
        return found
    earlier: dict[str, Any] = json.loads(file.read_text())
    of_seeds: dict[str, Any] = earlier.pop("seeds")
    recipes, wanted = earlier.pop("recipes"), how["recipes"]
    if earlier != {key: value for key, value in how.items() if key != "recipes"}:
        return found
    alike = {way for way, recipe in wanted.items() if recipes.get(way) == recipe}
    for seed, of_seed in of_seeds.items():
        points = of_seed.pop("points", {})
        kept = {way: at for way, at in points.items() if way in alike and (int(seed) not in seeds or way not in ways)}
        facts = of_seed if next(iter(wanted)) in alike else {}
        if kept or facts or seed in found:
            found[seed] = facts | ({"points": kept} if points else {})
    return found
