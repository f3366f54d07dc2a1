from pathlib import Path

import pytest

from modcompile.export.break_even import BreakEven, measure_break_even
from modcompile.export.session import MODEL_FILE


@pytest.mark.parametrize(
    ("open_ms", "skipping_ms", "dense_ms", "rate"),
    [
        pytest.param(11.0, 6.0, 10.0, 0.2, id="a fifth of what skipping gains"),
        pytest.param(9.0, 6.0, 10.0, 0.0, id="gates that cost nothing"),
        pytest.param(11.0, 10.5, 10.0, 1.0, id="gates that never pay"),
        pytest.param(11.0, 11.0, 10.0, 1.0, id="nothing gained"),
        pytest.param(11.0, 12.0, 10.0, 1.0, id="something lost"),
    ],
)
def test_a_gate_pays_where_what_it_skips_is_worth_what_it_costs(
    open_ms: float, skipping_ms: float, dense_ms: float, rate: float
) -> None:
    assert BreakEven(open_ms, skipping_ms, dense_ms).skip_rate == pytest.approx(rate)


def test_measures_a_gated_artifact_beside_another(onnx_folder: Path, dense_onnx_folders: dict[str, Path]) -> None:
    dense = dense_onnx_folders["llama"] / MODEL_FILE
    measured = measure_break_even(onnx_folder / MODEL_FILE, dense, [5, 6, 7])
    assert min(measured.open_ms, measured.skipping_ms, measured.dense_ms) > 0
    assert 0 <= measured.skip_rate <= 1
