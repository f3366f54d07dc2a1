from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from benchmarks.altered_graphs import save_beside, weights_in_branches, without_ifs
from modcompile.export.build_model import build_model
from modcompile.export.decoder import Decoder
from modcompile.export.session import MODEL_FILE, RoutedSession
from tests.export.onnx_text import operators
from tests.wide_models import MAX_POSITIONS, wide_lowered

IDS = np.array([[3, 1, 4, 1, 5]])


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    model = build_model(wide_lowered("llama", (range(2), range(2, 3))), max_positions=MAX_POSITIONS)
    ir.save(model, folder / MODEL_FILE, external_data=f"{MODEL_FILE}.data")
    return folder / MODEL_FILE


def _logits(model_file: Path) -> np.ndarray:
    session = RoutedSession(model_file, providers=["CPUExecutionProvider"])
    if session.num_thresholds:
        session.thresholds = 0.0
    decoder = Decoder(session, 1, 8)
    return np.stack([decoder.step(ids)[0] for ids in (IDS, IDS[:, :1], IDS[:, 1:2])])


@pytest.mark.parametrize("masks", [True, False])
def test_without_ifs_all_is_executed(exported: Path, tmp_path: Path, masks: bool) -> None:
    model = without_ifs(ir.load(exported), masks=masks)
    found = operators(model.graph)
    assert "If" not in found
    assert (found.count("Where") == operators(without_ifs(ir.load(exported)).graph).count("Where")) == masks
    save_beside(model, tmp_path / "altered")
    np.testing.assert_allclose(_logits(tmp_path / "altered" / MODEL_FILE), _logits(exported), rtol=1e-5, atol=1e-5)


def test_weights_of_one_branch_move_into_it(exported: Path, tmp_path: Path) -> None:
    before = ir.load(exported)
    model = weights_in_branches(ir.load(exported))
    moved = before.graph.initializers.keys() - model.graph.initializers.keys()
    (first, *_) = (node for node in model.graph if node.op_type == "If")
    held = first.attributes["then_branch"].as_graph().initializers
    assert held.keys() <= moved
    assert any(value.const_value is not None and value.const_value.size > 1000 for value in held.values())  # a matrix
    save_beside(model, tmp_path / "altered")
    np.testing.assert_array_equal(_logits(tmp_path / "altered" / MODEL_FILE), _logits(exported))
