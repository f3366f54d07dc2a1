from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from modcompile.config import RouterConfig
from modcompile.export.build_model import build_model
from modcompile.export.session import MODEL_FILE, RoutedSession
from modcompile.export.write_model import write_model
from modcompile.routed_graph import build_routed
from tests.tiny_routed import tiny_base

GATES = 34


@pytest.fixture(scope="module")
def model() -> ir.Model:
    """Of more gates than onnx_ir keeps the sizes of in a model by itself."""
    routed = build_routed(tiny_base(num_hidden_layers=GATES // 2), RouterConfig(granularity="attn+mlp"))
    return build_model(routed.hard_graph())


def test_a_model_of_many_gates_loads(model: ir.Model, tmp_path: Path) -> None:
    write_model(model, tmp_path / MODEL_FILE, f"{MODEL_FILE}.data")
    session = RoutedSession(tmp_path / MODEL_FILE, providers=["CPUExecutionProvider"])
    ids = np.arange(3, 10)[None]
    logits, *_ = session.run(ids, np.ones_like(ids), ids - 3, session.empty_cache(1))
    assert np.isfinite(logits).all()
    kinds = _outside(tmp_path / MODEL_FILE)
    assert ir.DataType.FLOAT in kinds
    assert ir.DataType.INT64 not in kinds
    ir.save(model, tmp_path / "small.onnx", external_data="small.data")
    assert ir.DataType.INT64 in _outside(tmp_path / "small.onnx")


def _outside(file: Path) -> set[ir.DataType]:
    """The types of what lies in the file of weights."""
    tensors = [value.const_value for value in ir.load(file).graph.initializers.values()]
    return {tensor.dtype for tensor in tensors if isinstance(tensor, ir.ExternalTensor)}
