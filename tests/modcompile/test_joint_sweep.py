import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from matplotlib.image import imread

from modcompile.config import RouterConfig
from modcompile.errors import ConfigError
from modcompile.joint_plot import draw_jointly, plot_jointly
from modcompile.joint_sweep import BOTH, DEPTH, PRECISION, JointPoint, frontier, sweep_jointly
from modcompile.joint_table import joint_table
from modcompile.layerwise import LayerwiseQuantizeForCausalLM
from modcompile.precision_evaluation import PrecisionEvaluation, PrecisionMeasurement, evaluate_precisions
from modcompile.weight_bytes import weight_bytes
from tests.tiny_quantized import save_deciding_routers

GATES = RouterConfig(router_hidden_size=0, lock_last_layers=1, skip_adapter="low_rank", adapter_rank=4)
TARGETS = [0.0, 0.5, 1.0]


@pytest.fixture(scope="module")
def rows(padded_rows: Dataset) -> Dataset:
    return padded_rows.select(range(3))


@pytest.fixture(scope="module")
def model(quantized_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> LayerwiseQuantizeForCausalLM:
    folder = Path(shutil.copytree(quantized_folder, tmp_path_factory.mktemp("gated") / "tiny"))
    save_deciding_routers(folder, GATES, precisions=[4, 16])
    return LayerwiseQuantizeForCausalLM.from_quantized(folder)


@pytest.fixture(scope="module")
def evaluation(model: LayerwiseQuantizeForCausalLM, rows: Dataset) -> PrecisionEvaluation:
    return evaluate_precisions(model, rows, rows)


@pytest.fixture(scope="module")
def points(model: LayerwiseQuantizeForCausalLM, evaluation: PrecisionEvaluation, rows: Dataset) -> list[JointPoint]:
    return sweep_jointly(model, evaluation, rows, rows, TARGETS, weight_bytes(model))


def _of(points: list[JointPoint], way: str, bits: str) -> list[JointPoint]:
    return [point for point in points if (point.way, point.bits) == (way, bits)]


def test_measures_all_bits_at_all_targets(points: list[JointPoint], evaluation: PrecisionEvaluation) -> None:
    choices = {tuple(bits) for bits in evaluation.static} | {(bits,) * 3 for bits in evaluation.fixed}
    assert evaluation.trained
    assert len(points) == (len(choices) + 1) * (1 + len(TARGETS))
    assert {point.bits for point in points if point.way == DEPTH} == {"16"}
    assert "16" not in {point.bits for point in points if point.way != DEPTH}
    assert all(point.active_ratio == 1 for point in points if point.way == PRECISION)
    assert {point.bits for point in points if point.way == PRECISION} == {
        point.bits for point in points if point.way == BOTH
    }


def test_targets_close_gates(points: list[JointPoint], evaluation: PrecisionEvaluation) -> None:
    for way, bits in ((DEPTH, "16"), (BOTH, "4"), (BOTH, "router")):
        executed, half, skipped = _of(points, way, bits)[-3:]
        assert (executed.active_ratio, skipped.active_ratio) == (1, 0)
        assert 0.2 < half.active_ratio < 0.8
        assert executed.bytes_per_token > half.bytes_per_token > skipped.bytes_per_token
    executed = _of(points, BOTH, "4")[0]
    assert executed.measured == evaluation.fixed[4]
    assert [share for share, *_ in (point.measured.shares for point in _of(points, BOTH, "4")[-1:])] == [{0: 1.0}]


def test_counts_the_bytes_of_what_was_used(points: list[JointPoint], model: LayerwiseQuantizeForCausalLM) -> None:
    read = weight_bytes(model)
    for point in points:
        assert point.bytes_per_token == read.per_token(point.measured.shares)
    (alone,) = _of(points, PRECISION, "4")
    assert alone.bytes_per_token == read.rest + sum(by_bits[4] for by_bits in read.blocks)


def test_routers_and_gates_then_decide_as_before(
    points: list[JointPoint], model: LayerwiseQuantizeForCausalLM, evaluation: PrecisionEvaluation, rows: Dataset
) -> None:
    assert model.hard_thresholds == [0.5, 0.5]
    assert evaluate_precisions(model, rows, rows).router == evaluation.router


def test_without_gates_there_is_nothing_to_sweep(
    quantized_folder: Path, evaluation: PrecisionEvaluation, rows: Dataset
) -> None:
    ungated = LayerwiseQuantizeForCausalLM.from_quantized(quantized_folder, [4, 16])
    with pytest.raises(ConfigError, match="no depth gates to sweep"):
        sweep_jointly(ungated, evaluation, rows, rows, TARGETS, weight_bytes(ungated))


def _point(way: str, megabytes: float, loss: float) -> JointPoint:
    return JointPoint(way, "4", 1.0, megabytes * 1e6, PrecisionMeasurement(loss, ({4: 1.0},)))


MADE = [_point(DEPTH, 9, 1.0), _point(PRECISION, 5, 3.0), _point(BOTH, 7, 2.0), _point(BOTH, 8, 2.5)]


def test_on_the_frontier_is_what_nothing_beats() -> None:
    assert frontier(MADE) == [MADE[1], MADE[2], MADE[0]]
    equal = [_point(DEPTH, 5, 3.0), _point(BOTH, 5, 2.9), _point(BOTH, 6, 2.9)]
    assert frontier(equal) == [equal[1]]
    assert frontier([]) == []


def test_the_table_has_a_star_for_each_of_these() -> None:
    head, *lines, legend = joint_table(MADE).splitlines()
    assert head.split() == ["bits", "active", "ratio", "MB", "a", "token", "perplexity"]
    assert [line.endswith("*") for line in lines] == [True, True, False, True]
    assert lines[0] == f"{PRECISION:15}       4         1.000        5.00      {math.exp(3):.3f}  *"
    assert legend.startswith("* ")


def test_draws_every_way_and_the_frontier(tmp_path: Path) -> None:
    unknown = _point(BOTH, 1, math.inf)
    (axes,) = draw_jointly([*MADE, unknown]).axes
    drawn = {str(line.get_label()): np.asarray(line.get_xydata()).tolist() for line in axes.get_lines()}
    assert drawn[DEPTH] == [[9.0, math.exp(1.0)]]
    assert [x for x, _ in drawn[BOTH]] == [7.0, 8.0]
    assert [x for x, _ in drawn["frontier"]] == [5.0, 7.0, 9.0]
    plot_jointly(MADE, tmp_path / "joint.png")
    assert imread(tmp_path / "joint.png").ndim == 3
