from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from modcompile.export.build_model import build_model
from modcompile.export.export_config import WeightRounding
from modcompile.export.float_activations import FloatActivations
from modcompile.export.round_weights import round_weights
from modcompile.export.session import MODEL_FILE
from modcompile.layerwise import LayerwiseQuantizeForCausalLM
from modcompile.passes.quantize_weights import quantize_weights
from modcompile.precision_config import PrecisionRouterConfig, QuantizationConfig
from modcompile.quantizing import quantize_base
from modcompile.routed_graph import trace_outlined
from tests.model_inputs import ModelInputs, make_inputs, run_model
from tests.tiny_models import VOCAB_SIZE, tiny_model

_LAYERS = 3
_BITS = (4, 8, 16)
# Activations are rounded to int8 there, and here they are not.
_TOLERANCE = 0.25


class _Built:
    """A model of three precisions, the ONNX model of it, and both run."""

    def __init__(self, base: PreTrainedModel) -> None:
        self.layerwise = LayerwiseQuantizeForCausalLM(
            quantize_base(base, QuantizationConfig(group_size=32, method="rtn")), PrecisionRouterConfig()
        )
        self.model = build_model(self.layerwise.export_graph(), emit_routing=True)
        options = ort.SessionOptions()
        options.log_severity_level = 3
        data = ir.to_proto(self.model).SerializeToString()
        self.session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])

    def run(self, inputs: ModelInputs, choices: list[int] | None = None) -> list[torch.Tensor]:
        """Logits, keys and values, and the bits of each block."""
        names = [value.name for value in self.session.get_inputs()]
        feeds = {name: tensor.numpy() for name, tensor in zip(names, inputs.flat, strict=True)}
        if choices is not None:
            bias = np.zeros((_LAYERS, len(_BITS)), np.float32)
            bias[range(_LAYERS), choices] = np.inf
            feeds["precision_bias"] = bias
        return [torch.from_numpy(array) for array in self.session.run(None, feeds)]


@pytest.fixture(scope="module")
def built(architecture: str) -> _Built:
    return _Built(tiny_model(architecture))  # its own: it is frozen


@pytest.mark.parametrize("choices", [[0, 0, 0], [1, 1, 1], [2, 2, 2], [2, 0, 1]])
@pytest.mark.parametrize(("length", "past"), [(5, 0), (1, 4), (3, 2)])
def test_one_model_computes_at_every_precision(
    built: _Built, model: PreTrainedModel, choices: list[int], length: int, past: int
) -> None:
    inputs = make_inputs(model, 2, length, past, "left", 0)
    actual = built.run(inputs, choices)
    built.layerwise.fix_precision([_BITS[choice] for choice in choices])
    with torch.no_grad():
        expected = built.layerwise.export_graph()(*inputs.flat)
    built.layerwise.fix_precision(None)
    cut = 1 + 2 * _LAYERS
    assert [int(bits.unique()) for bits in actual[cut:]] == [_BITS[choice] for choice in choices]
    assert all(torch.equal(one, other) for one, other in zip(actual[cut:], expected[cut:], strict=True))
    exact = all(_BITS[choice] == 16 for choice in choices)
    for one, other in zip(inputs.at_tokens(actual[:cut]), inputs.at_tokens(expected[:cut]), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5 if exact else _TOLERANCE)


def test_a_session_that_feeds_no_bias_lets_the_routers_choose(built: _Built, model: PreTrainedModel) -> None:
    inputs = make_inputs(model, 2, 5, 0, "left", 0)
    actual = built.run(inputs)
    assert [int(bits.unique()) for bits in actual[-_LAYERS:]] == [16] * _LAYERS
    outputs = [value.name for value in built.session.get_outputs()]
    assert outputs[-_LAYERS:] == [f"precision.{layer}" for layer in range(_LAYERS)]


def _products(graph: ir.Graph) -> int:
    """Quantized products of a graph itself, not of its branches."""
    return sum(node.op_type == "MatMulNBits" for node in graph)


def test_quantized_products_stand_one_if_deep(built: _Built, architecture: str) -> None:
    assert _products(built.model.graph) == 2 * _LAYERS  # of the routers
    conditionals = [node for node in built.model.graph if node.op_type == "If"]
    assert len(conditionals) == len(_BITS) * _LAYERS
    weights = {"gpt2": 4, "opt": 6}.get(architecture, 7)
    for index, conditional in enumerate(conditionals):
        branches = [conditional.attributes[name].as_graph() for name in ("then_branch", "else_branch")]
        assert not any(node.op_type == "If" for branch in branches for node in branch)
        # 4 bits; 4 + 4; the original weights. Else nothing, or what there was.
        expected = (weights, 2 * weights, 0)[index % len(_BITS)]
        assert [_products(branch) for branch in branches] == [expected, 0]


def test_parts_that_precisions_share_are_stored_once(built: _Built) -> None:
    codes = {name: value for name, value in built.model.graph.initializers.items() if "packed" in name}
    readers = {name: len(value.uses()) for name, value in codes.items() if ".decide." not in name}
    assert set(readers.values()) == {1, 2}
    assert sum(count == 2 for count in readers.values()) == len(readers) / 2


@pytest.mark.parametrize("rounding", [WeightRounding(4, 16, symmetric=False), WeightRounding(8, 64, symmetric=True)])
def test_embedding_and_head_are_on_codes_too(architecture: str, rounding: WeightRounding) -> None:
    """And on one set of them where they are tied; groups of 64 are wider than the embedding."""
    model = tiny_model(architecture)
    gm = trace_outlined(model)
    codes = round_weights(gm, rounding=rounding)
    built = build_model(quantize_weights(gm, codes))
    FloatActivations()(built)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    data = ir.to_proto(built).SerializeToString()
    session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    for length, past in ((5, 0), (1, 4)):
        inputs = make_inputs(model, 2, length, past, "left")
        names = [value.name for value in session.get_inputs()]
        feeds = {name: tensor.numpy() for name, tensor in zip(names, inputs.flat, strict=True)}
        actual = [torch.from_numpy(array) for array in session.run(None, feeds)]
        for one, other in zip(inputs.at_tokens(actual), inputs.at_tokens(run_model(model, inputs)), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-4)
    (lookup,) = (node for node in built.graph if node.op_type == "GatherBlockQuantized")
    (reshape,) = (node for node in built.graph if node.outputs[0] is lookup.inputs[0])
    head = [node for node in built.graph if node.op_type == "MatMulNBits"][-1]
    is_tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert (reshape.inputs[0] is head.inputs[1]) == is_tied
    stored = sum("packed" in name for name in built.graph.initializers)
    assert stored == len(codes)


_WIDE = LlamaConfig(
    hidden_size=512,
    intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=8,
    vocab_size=VOCAB_SIZE,
    max_position_embeddings=128,
)
_UNPREPARED = 10
"""Weights that ONNX Runtime has not prepared make this model take more than 40 times as long."""


def _prepared(precisions: list[int], folder: Path) -> tuple[float, ir.Model]:
    """The median seconds of a token, all blocks at the lowest precision, and the model as ONNX Runtime optimized it."""
    torch.manual_seed(0)
    checkpoint = quantize_base(LlamaForCausalLM(_WIDE).eval(), QuantizationConfig(precisions=precisions, method="rtn"))
    layerwise = LayerwiseQuantizeForCausalLM(checkpoint, PrecisionRouterConfig())
    folder.mkdir()
    ir.save(build_model(layerwise.export_graph()), folder / MODEL_FILE, external_data=f"{MODEL_FILE}.data")
    optimized = folder / "optimized.onnx"
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    options.optimized_model_filepath = str(optimized)
    session = ort.InferenceSession(str(folder / MODEL_FILE), options, providers=["CPUExecutionProvider"])
    ids, past = np.array([[7]]), np.zeros((1, 8, 0, 64), np.float32)
    feeds = {value.name: past for value in session.get_inputs() if value.name.startswith("past_key_values.")}
    feeds |= {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.zeros_like(ids)}
    feeds["precision_bias"] = np.array([np.inf, *[0] * (len(precisions) - 1)], np.float32) * np.ones((2, 1), np.float32)
    seconds = []
    for _ in range(9):
        start = perf_counter()
        session.run(["logits"], feeds)
        seconds.append(perf_counter() - start)
    return median(seconds), ir.load(optimized)


def test_weights_of_branches_are_prepared_as_those_of_one_precision(tmp_path: Path) -> None:
    """A ratio, with a margin that no load of the machine bridges."""
    alone, _ = _prepared([4], tmp_path / "alone")
    seconds, optimized = _prepared([4, 8, 16], tmp_path / "three")
    assert seconds / alone < _UNPREPARED
    conditionals = [node for node in optimized.graph if node.op_type == "If"]
    branches = [attribute.as_graph() for node in conditionals for attribute in node.attributes.values()]
    found = sum(map(_products, [optimized.graph, *branches]))
    assert found == sum(node.op_type == "MatMulNBits" for node in optimized.graph.all_nodes()) > 0
    assert not any(node.op_type == "If" for branch in branches for node in branch)
