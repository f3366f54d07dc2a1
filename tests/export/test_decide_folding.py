from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch

from modcompile.export.break_even import BreakEven
from modcompile.export.build_model import build_model
from modcompile.export.decide_folding import DecidedFolding, decide_folding, too_rare
from modcompile.export.export_config import ExportConfig
from modcompile.export.exportable import Exportable, Foldable, load_exportable
from modcompile.export.folding import UNFOLDED, Folding
from tests.tiny_routed import tiny_routed

TEXTS = [[(row * 37 + index * 11) % 300 for index in range(100)] for row in range(8)]
FIRST, LAST = range(1), range(2, 3)


def build(exportable: Exportable) -> ir.Model:
    return build_model(exportable.graph())


@pytest.fixture(scope="module")
def foldable(routed_folder: Path) -> Foldable:
    loaded = load_exportable(routed_folder, ExportConfig(verify="none"), lambda _: TEXTS).foldable
    assert loaded is not None
    return loaded


@pytest.mark.parametrize(("asked", "left"), [(UNFOLDED, ["0", "2"]), (Folding((), (FIRST,)), ["2"])])
def test_counts_what_gates_skip_and_measures(
    foldable: Foldable, tmp_path: Path, asked: Folding, left: list[str]
) -> None:
    decided = decide_folding(foldable, asked, build, tmp_path)
    model = tiny_routed("straight_through")
    model.set_router_mode([2.0 if asked.skipped else 0.5, 0.5])
    gates = torch.stack([torch.stack(model(torch.tensor([row])).gates) for row in TEXTS])
    skipped = 1 - gates.float().mean((0, 2, 3, 4))
    rates = {name: float(rate) for name, rate in zip(("0", "2"), skipped, strict=True) if name in left}
    assert decided.skip_rates == pytest.approx(rates)
    assert all(0 < rate < 1 for rate in rates.values())
    measured = decided.break_even
    assert measured is not None
    rare = {name for name, rate in decided.skip_rates.items() if rate < measured.skip_rate}
    assert {str(layers[0]) for layers in decided.folding.active} == rare
    assert decided.folding.skipped == asked.skipped
    assert not list(tmp_path.iterdir())
    assert foldable.model.hard_thresholds == [0.5, 0.5]


@pytest.mark.parametrize(("threshold", "folding"), [(0.0, Folding((FIRST, LAST))), (2.0, Folding((), (FIRST, LAST)))])
def test_constant_gates_need_no_measurement(
    foldable: Foldable, tmp_path: Path, threshold: float, folding: Folding
) -> None:
    foldable.model.set_router_mode(threshold)
    decided = decide_folding(foldable, UNFOLDED, build, tmp_path)
    foldable.model.set_router_mode(0.5)
    assert decided.folding == folding
    assert decided.break_even is None
    assert decided.summary().endswith(": the artifact is dense")


def test_a_gate_on_little_work_must_skip_more_often() -> None:
    rates = {FIRST: 0.2, LAST: 0.2, range(1, 2): 0.9}
    assert too_rare(rates, {FIRST: 1.0, LAST: 1.0}, 0.19) == ()
    assert too_rare(rates, {FIRST: 0.5, LAST: 1.5}, 0.19) == (FIRST,)
    assert too_rare(rates, {FIRST: 1.0, LAST: 1.0}, 0.21) == (FIRST, LAST)


def test_tells_what_was_measured() -> None:
    gates = (FIRST, range(1, 2), LAST)
    decided = DecidedFolding(gates, Folding((FIRST,)), {"0": 0.1, "1": 0.4, "2": 0.3}, BreakEven(11.0, 6.0, 10.0))
    assert decided.summary() == (
        "2 of 3 gates kept, 1 always open, 0 never; a gate pays from 20.0% of skipped steps (decoding one row: "
        "10.00 ms a token without these gates, 11.00 all open, 6.00 all skipping)"
    )
    told: dict[str, Any] = decided.as_json()
    assert told["always_active"] == ["0"]
    assert told["break_even_skip_rate"] == pytest.approx(0.2)
    assert told["decode_ms"] == {"open_ms": 11.0, "skipping_ms": 6.0, "dense_ms": 10.0}
