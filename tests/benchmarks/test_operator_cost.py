from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from benchmarks.operator_cost import measure, per_operator, read_bandwidth, table, weight_bytes
from benchmarks.peers.own_exports import Export, OwnCase
from modcompile.export.session import MODEL_FILE


def _event(name: str, kind: str, start: int, duration: int) -> dict[str, Any]:
    return {
        "cat": "Node",
        "name": f"{name}_kernel_time",
        "ts": start,
        "dur": duration,
        "args": {"op_name": kind},
    }


def _run(start: int, duration: int) -> dict[str, Any]:
    return {"cat": "Session", "name": "model_run", "ts": start, "dur": duration}


def test_an_if_is_told_with_what_its_branch_leaves() -> None:
    events = [
        _run(0, 1000),
        _event("w", "MatMulNBits", 10, 900),  # of a run before the last ones
        _run(2000, 100),
        _event("if", "If", 2010, 50),
        _event("w", "MatMulNBits", 2020, 30),
        _event("a", "Add", 2065, 5),
        _run(3000, 100),
        _event("if", "If", 3010, 70),
        _event("w", "MatMulNBits", 3020, 40),
        _event("a", "Add", 3085, 5),
    ]
    found = per_operator(events, {"w": 2_000_000}, last_steps=2)
    assert list(found) == ["MatMulNBits", "If", "Add"]
    assert found["MatMulNBits"] == {"calls": 1, "ms": pytest.approx(0.035), "megabytes": 2}
    assert found["If"] == {"calls": 1, "ms": pytest.approx(0.025), "megabytes": 0}
    assert found["Add"]["ms"] == pytest.approx(0.005)


def test_counts_the_weights_that_a_product_reads_whole(tmp_path: Path) -> None:
    weight = ir.Value(name="w", const_value=ir.tensor(np.zeros((4, 8), np.float32)))
    x = ir.Value(name="x")
    product = ir.Node("", "MatMul", [x, weight], name="product")
    gather = ir.Node("", "Gather", [weight, x], name="gather")
    outputs = [product.outputs[0], gather.outputs[0]]
    graph = ir.Graph([x], outputs, nodes=[product, gather], initializers=[weight], opset_imports={"": 20})
    ir.save(ir.Model(graph, ir_version=10), tmp_path / "model.onnx")
    assert weight_bytes(tmp_path / "model.onnx") == {"product": 4 * 8 * 4}


@pytest.mark.slow
def test_tells_the_operators_of_an_export(onnx_folder: Path) -> None:
    case = measure(OwnCase("", Export("", ()), skipped=0.0), onnx_folder / MODEL_FILE, 4, 2, 1)
    assert case["step_ms"] > 0
    operators = case["operators"]
    assert operators["If"]["calls"] == 2
    assert operators["MatMul"]["megabytes"] > 0
    text = table(
        {
            "model": "tiny",
            "arguments": {"threads": 1, "new_tokens": 2, "prompt_tokens": 4},
            "versions": {"onnxruntime": "1"},
            "read_gigabytes_per_second": read_bandwidth(1),
            "cases": {"ours": case},
        }
    )
    assert "\n| MatMul | " in text
    assert "- tiny, 1 threads, 2 tokens after 4, ONNX Runtime 1.\n" in text
