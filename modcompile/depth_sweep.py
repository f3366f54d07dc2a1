"""What a routed model loses at each share of the work, beside what it is to beat."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset

from modcompile.calibrating import calibrate_thresholds
from modcompile.changed_routing import random_gates, without_adapters
from modcompile.modeling import RoutedForCausalLM
from modcompile.perplexity import Measurement, measure
from modcompile.progress import show_elapsed
from modcompile.static_selection import select_static, thresholds_of

ROUTER, STATIC, STATIC_ALONE, RANDOM = "router", "static", "static without adapters", "random"
WAYS = (ROUTER, STATIC, STATIC_ALONE, RANDOM)
DENSE = "dense"


@dataclass(frozen=True)
class Sweep:
    """By way of skipping, what was measured, from much work to little."""

    dense: Measurement
    ways: dict[str, list[Measurement]]
    thresholds: dict[str, list[list[float]]] = field(default_factory=dict)
    """Of the ways that any thresholds of the gates make: at which each point was measured."""
    speeds: dict[str, list[float]] = field(default_factory=dict)
    """Of the same, and of `DENSE`, in tokens a second, where they were measured."""


def sweep_depth(
    model: RoutedForCausalLM,
    blocks: Dataset,
    calibration: Dataset,
    targets: Sequence[float],
    *,
    candidates: int,
    batch_size: int = 4,
    seed: int = 0,
) -> Sweep:
    """Measure on `blocks` what is decided on `calibration`, another text.

    - router: at one threshold for all gates, calibrated for each of `targets`
    - static: the best gates to close for all tokens, greedily, until the least target is reached; where the model has
      adapters, with them, and selected anew without
    - random: each gate closed for as many tokens, drawn at random

    The router mode of the model and its usage stay as they were.

    Raises:
        ConfigError: a target is outside of [0, 1].
        DataError: there is no token to predict, or one that the model does not have.
    """
    gates = len(model.gated_layers)
    ordered = sorted(targets, reverse=True)

    def measured(thresholds: float | Sequence[float]) -> Measurement:
        return measure(model, blocks, thresholds, batch_size=batch_size)

    with show_elapsed("measuring the dense model"):
        ways: dict[str, list[Measurement]] = {}
        dense = measured(0.0)
    with show_elapsed("measuring the routers"):
        found = [calibrate_thresholds(model, calibration, each, "global", batch_size=batch_size) for each in ordered]
        thresholds = {ROUTER: [list(each.thresholds) for each in found]}
        ways[ROUTER] = [measured(each) for each in thresholds[ROUTER]]
    statics: dict[str, AbstractContextManager[Any]] = {STATIC: nullcontext()}
    if model.adapters:
        statics[STATIC_ALONE] = without_adapters(model)
    for name, changed in statics.items():
        with show_elapsed(f"selecting: {name}"), changed:
            selections = select_static(
                model, calibration, 1 - min(targets), candidates=candidates, batch_size=batch_size
            )
            thresholds[name] = [thresholds_of(each.closed, gates) for each in selections]
            ways[name] = [measured(each) for each in thresholds[name]]
    with show_elapsed("measuring random skipping"), random_gates(model, seed):
        ways[RANDOM] = [measured(1 - each) for each in ordered]
    thresholds.pop(STATIC_ALONE, None)
    return Sweep(dense, ways, thresholds)
