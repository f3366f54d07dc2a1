"""Perplexity of a trained folder on every text, at the shares of the work that its thresholds make."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from benchmarks.quality.recipes import RANDOM, ROUTED, SEARCHED, Recipe
from benchmarks.quality.runs import Trained, beside
from benchmarks.quality.texts import digest, digests
from modcompile.artifacts import load_with_routers
from modcompile.calibrating import calibrate_thresholds
from modcompile.changed_routing import random_gates
from modcompile.durable_files import replace_file
from modcompile.modeling import RoutedForCausalLM
from modcompile.perplexity import measure
from modcompile.threshold_search import search_thresholds
from modcompile.tracing import find_layers

_MOVES = (-0.3, 0.0, 0.3)
"""Of all thresholds that were searched for a budget, in logits: a search takes minutes, and serves budgets near it."""

Points = dict[str, dict[str, list[dict[str, float]]]]
"""By way of skipping, then by text: `target`, `work`, `perplexity` against dense; how far thresholds were `moved`."""


def measured(
    training: Trained, recipe: Recipe, texts: Mapping[str, Dataset], calibration: Dataset, targets: Sequence[float]
) -> Points:
    """What `measure_folder` finds, kept beside the folder: of the same training and texts, it is not measured again."""
    asked = _asked(training, texts, calibration, targets)
    return _kept(
        beside(training.folder, ".measured.json"),
        asked,
        lambda: measure_folder(training.folder, recipe, texts, calibration, targets),
    )


def searched(
    training: Trained,
    texts: Mapping[str, Dataset],
    calibration: Dataset,
    search: Dataset,
    targets: Sequence[float],
) -> Points:
    """Routers at thresholds searched gate by gate for each target (`search_thresholds`), kept in the same way."""

    def measure_all() -> Points:
        model = load_with_routers(training.folder, use_cache=False)
        dense = _dense(model, texts)
        found: dict[str, list[dict[str, float]]] = {name: [] for name in texts}
        for target in targets:
            thresholds = search_thresholds(
                model, calibration, _active_ratio(model, target), search, bf16=True
            ).thresholds
            logits = torch.tensor(thresholds, dtype=torch.float64).logit()
            for move in _MOVES:
                moved = _points(model, texts, dense, {target: torch.sigmoid(logits + move).tolist()})
                for name, points in moved.items():
                    found[name] += [point | {"moved": move} for point in points]
        return {SEARCHED: found}

    asked = _asked(training, texts, calibration, targets) | {"search": digest(search)}
    return _kept(beside(training.folder, ".searched.json"), asked, measure_all)


def _asked(
    training: Trained, texts: Mapping[str, Dataset], calibration: Dataset, targets: Sequence[float]
) -> dict[str, Any]:
    return {
        "training": training.command,
        "targets": list(targets),
        "texts": digests(texts),
        "calibration": digest(calibration),
    }


def _kept(file: Path, asked: dict[str, Any], measure_all: Callable[[], Points]) -> Points:
    """What `file` has, if it was measured as `asked`; else what is measured now, and then it has that."""
    if file.is_file():
        found: dict[str, Any] = json.loads(file.read_text())
        if found["asked"] == asked:
            points: Points = found["points"]
            return points
    points = measure_all()
    content = json.dumps({"asked": asked, "points": points}, indent=2)
    replace_file(file, lambda staging: staging.write_text(content + "\n"))
    return points


def measure_folder(
    folder: Path, recipe: Recipe, texts: Mapping[str, Dataset], calibration: Dataset, targets: Sequence[float]
) -> Points:
    """Routers at thresholds calibrated for each target, and random tokens for them; all others at 0.5."""
    model = load_with_routers(folder, use_cache=False)
    dense = _dense(model, texts)
    if recipe.way != ROUTED:
        assert recipe.work is not None
        return {recipe.way: _points(model, texts, dense, {recipe.work: 0.5})}
    ratios = {target: _active_ratio(model, target) for target in targets}
    calibrated = {
        target: calibrate_thresholds(model, calibration, ratio, "global").thresholds for target, ratio in ratios.items()
    }
    routed = {ROUTED: _points(model, texts, dense, calibrated)}
    with random_gates(model, seed=0):
        return routed | {RANDOM: _points(model, texts, dense, {target: 1 - ratio for target, ratio in ratios.items()})}


def _dense(model: RoutedForCausalLM, texts: Mapping[str, Dataset]) -> dict[str, float]:
    """Perplexity with all gates open, by text."""
    return {name: measure(model, blocks, 0.0).perplexity for name, blocks in texts.items()}


def _points(
    model: RoutedForCausalLM,
    texts: Mapping[str, Dataset],
    dense: Mapping[str, float],
    thresholds: Mapping[float, Sequence[float] | float],
) -> dict[str, list[dict[str, float]]]:
    """By text, at the thresholds for each target, beside what `_dense` found."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in texts}
    for target, threshold in thresholds.items():
        for name, blocks in texts.items():
            one = measure(model, blocks, threshold)
            against = one.perplexity / dense[name]
            found[name].append({"target": target, "work": one.block_work, "perplexity": against})
    return found


def _active_ratio(model: RoutedForCausalLM, work: float) -> float:
    """Of the routed layers, for a share of the work of all."""
    routed = sum(model.work.values()) / len(find_layers(model.base))
    return max(0.0, 1 - (1 - work) / routed)
