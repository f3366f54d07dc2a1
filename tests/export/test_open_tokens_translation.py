from typing import Any

import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import fx, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from modcompile.export.build_model import CACHE, IN_PLACE, build_model
from modcompile.passes import drop_guards, group_blocks, harden_gates, insert_depth_gates, lower_gates, outline_blocks
from modcompile.routers import SoftGate
from modcompile.tracing import trace_causal_lm
from tests.export.onnx_text import operators
from tests.model_inputs import ModelInputs, make_inputs
from tests.tiny_graphs import random_routers, shared_model
from tests.tiny_models import HIDDEN_SIZE, VOCAB_SIZE

MAX_POSITIONS = 128
_WIDE: dict[str, Any] = {
    "hidden_size": HIDDEN_SIZE,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,  # of fewer, ONNX Runtime rotates none
    "vocab_size": VOCAB_SIZE,
    "initializer_range": 0.2,
}


def model_of(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if name == "llama":
        return LlamaForCausalLM(LlamaConfig(**_WIDE)).eval()
    if name == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**_WIDE)).eval()
    return shared_model(name)


@pytest.fixture(scope="module", params=["llama", "qwen3", "opt", "gpt2"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return model_of(request.param)


@pytest.fixture(scope="module")
def lowered(model: PreTrainedModel) -> fx.GraphModule:
    """Layers 0 and 1 share a gate, and layer 2 has its own."""
    routers: dict[int, nn.Module] = {**random_routers((0, 2))}
    outlined = outline_blocks(drop_guards(trace_causal_lm(model)))
    grouped = group_blocks(outlined, [range(2), range(2, 3)])
    return lower_gates(harden_gates(insert_depth_gates(grouped, routers, SoftGate())))


@pytest.fixture(scope="module", params=[None, MAX_POSITIONS], ids=["onnx", "ort"])
def built(lowered: fx.GraphModule, request: pytest.FixtureRequest) -> ir.Model:
    return build_model(lowered, emit_routing=True, max_positions=request.param, compact=True)


@pytest.fixture(scope="module")
def session(built: ir.Model) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    data = ir.to_proto(built).SerializeToString()
    return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def run(session: ort.InferenceSession, inputs: ModelInputs, thresholds: torch.Tensor) -> list[torch.Tensor]:
    names = ["input_ids", "attention_mask", "position_ids"]
    names += [f"past_key_values.{layer}.{part}" for layer in range(3) for part in ("key", "value")]
    taken = {value.name for value in session.get_inputs()}
    feeds = {name: tensor.numpy() for name, tensor in zip(names, inputs.flat, strict=True) if name in taken}
    return list(map(torch.from_numpy, session.run(None, feeds | {"routing_threshold": thresholds.numpy()})))


THRESHOLDS = {"some": (0.5, 0.5), "all": (0.0, 0.0), "none": (2.0, 2.0), "one of two": (2.0, 0.5)}


@pytest.mark.parametrize("thresholds", THRESHOLDS.values(), ids=THRESHOLDS)
@torch.no_grad()
def test_computes_what_masked_blocks_do(
    lowered: fx.GraphModule,
    session: ort.InferenceSession,
    model: PreTrainedModel,
    thresholds: tuple[float, float],
) -> None:
    """Prompts of a batch, padded on either side, and of one row; and decode steps."""
    stored = torch.tensor(thresholds)
    lowered.get_buffer("routing_threshold").copy_(stored)
    cases = [make_inputs(model, 3, length, 0, side) for length in (1, 6) for side in ("none", "left", "right")]
    cases += [make_inputs(model, 1, 5, 4), make_inputs(model, 3, 1, 4)]
    opened = []
    for inputs in cases:
        expected, actual = lowered(*inputs.flat), run(session, inputs, stored)
        for mask, expected_mask in zip(actual[-2:], expected[-2:], strict=True):
            assert torch.equal(mask, expected_mask.squeeze(-1))
            opened += mask[inputs.is_token].tolist()
        at_tokens = [output[inputs.is_token] for output in (actual[0], expected[0])]
        torch.testing.assert_close(*at_tokens, rtol=0, atol=2e-5)
        if not (inputs.attention_mask == 0).any():
            torch.testing.assert_close(actual[1:7], list(expected[1:7]), rtol=0, atol=1e-5)
    assert {"some": {True, False}, "all": {True}, "none": {False}, "one of two": {True, False}}[
        next(name for name, value in THRESHOLDS.items() if value == thresholds)
    ] == set(opened)


def test_counts_and_scatters_in_the_branch_that_executes(built: ir.Model) -> None:
    shared, own = (node for node in built.graph if node.op_type == "If")
    for node, num_blocks in ((shared, 2), (own, 1)):
        executed, skipped = (operators(node.attributes[name].as_graph()) for name in ("then_branch", "else_branch"))
        assert executed.count("ScatterND") == num_blocks
        assert executed.count("GatherND") == 2 * num_blocks
        assert executed.count("Where") == 0
        assert not {"NonZero", "GatherND", "ScatterND"} & set(skipped)


def test_leaves_the_fusions_for_onnxruntime(lowered: fx.GraphModule, built: ir.Model) -> None:
    """Whatever they are for this architecture: the same of both kinds of blocks."""
    is_ort = built.metadata_props.get(CACHE) == IN_PLACE
    masked = build_model(lowered, max_positions=MAX_POSITIONS if is_ort else None)
    counted = []
    for each in (built, masked):
        branches = [node.attributes["then_branch"].as_graph() for node in each.graph if node.op_type == "If"]
        names = [name for branch in branches for name in operators(branch)]
        fused = ("Attention", "GroupQueryAttention", "SkipSimplifiedLayerNormalization", "RMSNormalization", "Split")
        counted.append({name: names.count(name) for name in fused})
    assert counted[0] == counted[1]
    assert is_ort == (counted[0]["GroupQueryAttention"] == 3)
