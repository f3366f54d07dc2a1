from collections.abc import Iterator
from pathlib import Path

import onnx_ir as ir
import onnxruntime as ort
import pytest
from torch import fx

from modcompile.export.build_model import build_model
from modcompile.export.export_config import WeightRounding
from modcompile.export.inner_weights import InnerWeights
from modcompile.export.round_weights import round_weights
from modcompile.passes.quantize_weights import quantize_weights
from tests.wide_models import GATED_LAYERS, MAX_POSITIONS, wide_lowered


@pytest.fixture(scope="module")
def quantized() -> fx.GraphModule:
    gm = wide_lowered("llama")
    return quantize_weights(gm, round_weights(gm, rounding=WeightRounding(4, 16, symmetric=False)))


def _graphs(graph: ir.Graph, depth: int = 0) -> Iterator[tuple[int, ir.Graph]]:
    """With how deep in branches they are."""
    yield depth, graph
    for node in graph:
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                yield from _graphs(attribute.as_graph(), depth + 1)


def _products(graph: ir.Graph) -> list[ir.Node]:
    return [node for node in graph if node.op_type == "MatMulNBits"]


def _weights(node: ir.Node) -> list[ir.Value]:
    """What a product multiplies by: codes, scales, zero points."""
    return [value for value in node.inputs[1:] if value is not None]


def test_weights_of_branches_in_branches_are_those_of_the_branch_once_a_session_has_started(
    quantized: fx.GraphModule, tmp_path: Path
) -> None:
    """ONNX Runtime prepares those, and of products further in no others."""
    model = build_model(quantized, max_positions=MAX_POSITIONS, unmasked_branch=True)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    inner = [graph for depth, graph in _graphs(ir.load(tmp_path / "optimized.onnx").graph) if depth == 2]
    assert len(inner) == 2 * len(GATED_LAYERS)
    for graph in inner:
        assert _products(graph)
        assert all(
            value.is_initializer() and value.graph is graph for each in _products(graph) for value in _weights(each)
        )


def test_what_is_less_deep_stays_as_it_is(quantized: fx.GraphModule) -> None:
    model = build_model(quantized, max_positions=MAX_POSITIONS, unmasked_branch=True)
    outer = [graph for depth, graph in _graphs(model.graph) if depth < 2]
    assert len(outer) == 1 + 2 * len(GATED_LAYERS)
    weights = [value for graph in outer for each in _products(graph) for value in _weights(each)]
    assert weights
    assert all(value.is_initializer() for value in weights)


def test_each_weight_is_stored_once(quantized: fx.GraphModule) -> None:
    sizes = []
    for added in (False, True):
        model = build_model(quantized, max_positions=MAX_POSITIONS, unmasked_branch=added)
        tensors = [value.const_value for value in model.graph.initializers.values()]
        sizes.append(sum(tensor.nbytes for tensor in tensors if tensor is not None))
    assert sizes[1] == sizes[0]


def test_is_done_once(quantized: fx.GraphModule) -> None:
    model = build_model(quantized, max_positions=MAX_POSITIONS, unmasked_branch=True)
    assert not InnerWeights()(model).modified


@pytest.mark.parametrize("unmasked_branch", [False, True])
def test_leaves_other_products(unmasked_branch: bool) -> None:
    """Those of floats; and there are no others where branches are one deep."""
    gm = wide_lowered("llama")
    model = build_model(gm, max_positions=MAX_POSITIONS, unmasked_branch=unmasked_branch)
    inner = [graph for depth, graph in _graphs(model.graph) if depth == 2]
    assert len(inner) == (2 * len(GATED_LAYERS) if unmasked_branch else 0)
    assert not [node for graph in inner for node in graph if node.op_type == "Reshape"]
