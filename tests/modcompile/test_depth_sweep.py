from collections.abc import Callable

import numpy as np
import pytest
import torch
from datasets import Dataset

from modcompile.depth_sweep import Sweep, sweep_depth
from modcompile.modeling import RoutedForCausalLM
from modcompile.perplexity import evaluate_model
from modcompile.sweep_plot import draw_sweep
from tests.tiny_routed import tiny_adapted, tiny_routed

TARGETS = [0.4, 0.8]


def _blocks(seed: int) -> Dataset:
    ids = torch.randint(3, 300, (8, 32), generator=torch.Generator().manual_seed(seed))
    columns = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    return Dataset.from_dict({name: tensor.tolist() for name, tensor in columns.items()})


def _swept(make: Callable[..., RoutedForCausalLM]) -> tuple[RoutedForCausalLM, Sweep]:
    model = make("straight_through", use_cache=False)
    model.set_router_mode(0.3)
    usage = model.usage
    sweep = sweep_depth(model, _blocks(0), _blocks(1), TARGETS, candidates=2)
    assert model.usage is usage
    assert model.hard_thresholds == pytest.approx([0.3] * len(model.gated_layers))
    return model, sweep


def test_measures_each_way_at_each_share() -> None:
    model, sweep = _swept(tiny_adapted)
    dense = evaluate_model(model, _blocks(0)).dense
    assert sweep.dense == dense
    assert list(sweep.ways) == ["router", "static", "static without adapters", "random"]
    for way in ("router", "random"):
        assert [point.active_ratio for point in sweep.ways[way]] == pytest.approx([0.8, 0.4], abs=0.06)
    # Two gates, of two layers and of one: the least share closes one of them.
    for way in ("static", "static without adapters"):
        (point,) = sweep.ways[way]
        assert point.active_ratio in (pytest.approx(1 / 3), pytest.approx(2 / 3))
    assert sweep.ways["static"] != sweep.ways["static without adapters"]


def test_static_points_are_what_their_gates_lose() -> None:
    model, sweep = _swept(tiny_routed)
    assert list(sweep.ways) == ["router", "static", "random"]
    (point,) = sweep.ways["static"]
    closed = [evaluate_model(model, _blocks(1), hard_threshold=gates).hard.loss for gates in ([2.0, 0.0], [0.0, 2.0])]
    chosen = [2.0, 0.0] if closed[0] < closed[1] else [0.0, 2.0]
    assert point == evaluate_model(model, _blocks(0), hard_threshold=chosen).hard


def test_draws_every_way_from_the_dense_model_on() -> None:
    _, sweep = _swept(tiny_adapted)
    (axes,) = draw_sweep(sweep).axes
    drawn = {str(line.get_label()): np.asarray(line.get_xydata()).tolist() for line in axes.get_lines()}
    assert list(drawn) == list(sweep.ways)
    for name, points in sweep.ways.items():
        expected = [[1.0, 1.0]]
        expected += [[point.block_work, point.perplexity / sweep.dense.perplexity] for point in points]
        assert np.allclose(drawn[name], expected)
