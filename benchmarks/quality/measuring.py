"""Perplexity of a trained folder on every text, at the shares of the work that its thresholds make."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from benchmarks.quality.recipes import ROUTED, Recipe
from benchmarks.quality.runs import Trained, beside
from benchmarks.quality.texts import digest, digests
from modcompile.artifacts import load_with_routers
from modcompile.calibrating import calibrate_thresholds
from modcompile.changed_routing import random_gates
from modcompile.durable_files import replace_file
from modcompile.modeling import RoutedForCausalLM
from modcompile.perplexity import measure
from modcompile.tracing import find_layers

RANDOM = "random tokens"

Points = dict[str, dict[str, list[dict[str, float]]]]
"""By way of skipping, then by text: `target`, `work`, and `perplexity` against dense."""


def measured(
    training: Trained, recipe: Recipe, texts: Mapping[str, Dataset], calibration: Dataset, targets: Sequence[float]
) -> Points:
    """What `measure_folder` finds, kept beside the folder: of the same training and texts, it is not measured again."""
    kept = beside(training.folder, ".measured.json")
    asked = {
        "training": training.command,
        "targets": list(targets),
        "texts": digests(texts),
        "calibration": digest(calibration),
    }
    if kept.is_file():
        found: dict[str, Any] = json.loads(kept.read_text())
        if found["asked"] == asked:
            points: Points = found["points"]
            return points
    points = measure_folder(training.folder, recipe, texts, calibration, targets)
    content = json.dumps({"asked": asked, "points": points}, indent=2)
    replace_file(kept, lambda staging: staging.write_text(content + "\n"))
    return points


def measure_folder(
    folder: Path, recipe: Recipe, texts: Mapping[str, Dataset], calibration: Dataset, targets: Sequence[float]
) -> Points:
    """Routers at thresholds calibrated for each target, and random tokens for them; all others at 0.5."""
    model = load_with_routers(folder, use_cache=False)
    dense = {name: measure(model, blocks, 0.0).perplexity for name, blocks in texts.items()}

    def points(thresholds: Mapping[float, Sequence[float] | float]) -> dict[str, list[dict[str, float]]]:
        found: dict[str, list[dict[str, float]]] = {name: [] for name in texts}
        for target, threshold in thresholds.items():
            for name, blocks in texts.items():
                one = measure(model, blocks, threshold)
                against = one.perplexity / dense[name]
                found[name].append({"target": target, "work": one.block_work, "perplexity": against})
        return found

    if recipe.way != ROUTED:
        assert recipe.work is not None
        return {recipe.way: points({recipe.work: 0.5})}
    ratios = {target: _active_ratio(model, target) for target in targets}
    calibrated = {
        target: calibrate_thresholds(model, calibration, ratio, "global").thresholds for target, ratio in ratios.items()
    }
    routed = {ROUTED: points(calibrated)}
    with random_gates(model, seed=0):
        return routed | {RANDOM: points({target: 1 - ratio for target, ratio in ratios.items()})}


def _active_ratio(model: RoutedForCausalLM, work: float) -> float:
    """Of the routed layers, for a share of the work of all."""
    routed = sum(model.work.values()) / len(find_layers(model.base))
    return max(0.0, 1 - (1 - work) / routed)
