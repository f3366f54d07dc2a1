"""Small ONNX models as text: rewrite them, check them, run them."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray

Arrays = Mapping[str, NDArray[Any]]


def model_of(graph: str) -> ir.Model:
    """A model of one graph in ONNX's textual form."""
    return ir.from_onnx_text(f'<ir_version: 11, opset_import: ["": 23]>\n{graph}')


def rewritten(graph: str, rewrite: ir.passes.PassBase) -> ir.Model:
    """The model after a pass that must say that it changed it and, run again, that it did not."""
    model = model_of(graph)
    before = ir.to_proto(model).SerializeToString()
    assert rewrite(model).modified
    after = ir.to_proto(model).SerializeToString()
    assert after != before
    assert not rewrite(model).modified
    assert ir.to_proto(model).SerializeToString() == after
    return model


def assert_left_alone(graph: str, rewrite: ir.passes.PassBase) -> None:
    model = model_of(graph)
    before = ir.to_proto(model).SerializeToString()
    assert not rewrite(model).modified
    assert ir.to_proto(model).SerializeToString() == before


def operators(graph: ir.Graph) -> list[str]:
    """In order; those of the branches of an `If` stand before it."""
    found = []
    for node in graph:
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                found += operators(attribute.as_graph())
        found.append(node.op_type)
    return found


def run(model: ir.Model, feeds: Arrays) -> dict[str, NDArray[Any]]:
    """The outputs by name, from ONNX Runtime, of a model that the ONNX checker accepts."""
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feeds)), strict=True))


def assert_same(actual: ir.Model, graph: str, feeds: Arrays) -> None:
    """The rewritten model returns what the model of the text returns, under the same names, bit for bit."""
    expected = run(model_of(graph), feeds)
    outputs = run(actual, feeds)
    assert outputs.keys() == expected.keys()
    for name, array in expected.items():
        assert outputs[name].dtype == array.dtype
        np.testing.assert_array_equal(outputs[name], array)
