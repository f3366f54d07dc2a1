from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import fx, nn
from transformers import PreTrainedModel

from modcompile.export.build_model import build_model
from modcompile.export.hoist_shared import HoistShared
from modcompile.export.pretranspose_weights import PretransposeWeights
from modcompile.layer_ranges import name_of
from modcompile.passes import lower_gates
from modcompile.routers import DepthRouter
from tests.export.onnx_text import operators
from tests.model_inputs import ModelInputs, make_inputs
from tests.passes.routing_cases import RoutingCase, routing_cases
from tests.tiny_graphs import hard_graph, outlined_graph, random_adapters, random_routers, shared_model
from tests.tiny_models import HIDDEN_SIZE, VOCAB_SIZE

NUM_LAYERS = 3
SINGLE = tuple(range(layer, layer + 1) for layer in range(NUM_LAYERS))
STORED = (0.3, 0.45, 0.6)
ADAPTED = ("mistral", "opt")
"""Where tokens that skip a layer go through an adapter: of layers that share a gate, and alone."""
INPUTS = ["input_ids", "attention_mask", "position_ids"] + [
    f"past_key_values.{layer}.{part}" for layer in range(NUM_LAYERS) for part in ("key", "value")
]


@dataclass(frozen=True)
class Built:
    """A lowered graph and what `build_model` makes of it; the model is not to be changed."""

    gm: fx.GraphModule
    gates: tuple[range, ...]
    model: ir.Model
    session: ort.InferenceSession

    @property
    def adapters(self) -> list[str]:
        return [name for name, _ in self.gm.named_modules() if name.endswith(".skip")]

    def run(self, inputs: ModelInputs, threshold: np.ndarray | None = None) -> tuple[torch.Tensor, ...]:
        """Logits, present keys and values, routing masks."""
        feeds = {name: tensor.numpy() for name, tensor in zip(INPUTS, inputs.flat, strict=True)}
        if threshold is not None:
            feeds["routing_threshold"] = threshold
        return tuple(map(torch.from_numpy, self.session.run(None, feeds)))

    @torch.no_grad()
    def run_torch(self, inputs: ModelInputs, threshold: np.ndarray) -> tuple[list[torch.Tensor], bool]:
        """The same from the lowered graph, and whether rounding could turn a decision."""
        self.gm.get_buffer("routing_threshold").copy_(torch.from_numpy(threshold))
        gates: list[torch.Tensor] = []
        biases = self.gm.get_submodule("routing_inputs").parameters()
        hooks = [
            self.gm.get_submodule(f"blocks.{name_of(layers)}.decide.score").register_forward_hook(
                lambda *args, bias=bias: gates.append((args[-1] + bias).sigmoid())
            )
            for layers, bias in zip(self.gates, biases, strict=True)
        ]
        logits, *rest = self.gm(*inputs.flat)
        for hook in hooks:
            hook.remove()
        cut = 2 * NUM_LAYERS
        outputs = [logits, *rest[:cut], *(mask.squeeze(-1) for mask in rest[cut:])]
        close = any(bool(((gate - t).abs() < 1e-4).any()) for gate, t in zip(gates, threshold.tolist(), strict=True))
        return outputs, close

    @property
    def conditionals(self) -> list[ir.Node]:
        return [node for node in self.model.graph if node.op_type == "If"]


def build(gm: fx.GraphModule, gates: tuple[range, ...]) -> Built:
    model = build_model(gm, emit_routing=True)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    data = ir.to_proto(model).SerializeToString()
    return Built(gm, gates, model, ort.InferenceSession(data, options, providers=["CPUExecutionProvider"]))


@pytest.fixture(scope="module")
def built(architecture: str) -> Built:
    # Where every layer is routed, no block is exported on its own: that saves time.
    gates = {"llama": (range(1), range(2, 3)), "mistral": (range(2), range(2, 3))}.get(architecture, SINGLE)
    at_once = {"mistral": 2, "qwen2": 2, "opt": 3}.get(architecture, 1)
    routers = random_routers(layers.start for layers in gates)
    adapters = random_adapters(range(NUM_LAYERS)) if architecture in ADAPTED else None
    gm = lower_gates(hard_graph(architecture, routers, gates, gates_per_decision=at_once, adapters=adapters))
    gm.get_buffer("routing_threshold").copy_(torch.tensor(STORED[: len(gates)]))
    return build(gm, gates)


THRESHOLDS = st.one_of(
    st.sampled_from([0.0, 0.5, 2.0]).map(lambda value: [value] * NUM_LAYERS),
    st.lists(st.sampled_from([0.0, 0.4, 0.5, 0.6, 1.0, 2.0]), min_size=NUM_LAYERS, max_size=NUM_LAYERS),
)


@given(case=routing_cases(max_past=9), thresholds=THRESHOLDS)
def test_computes_what_pytorch_computes(
    built: Built, model: PreTrainedModel, case: RoutingCase, thresholds: list[float]
) -> None:
    inputs, threshold = case.inputs(model), np.array(thresholds[: len(built.gates)], np.float32)
    expected, close = built.run_torch(inputs, threshold)
    assume(not close)
    actual = built.run(inputs, threshold)
    cut = 1 + 2 * NUM_LAYERS
    for mask, expected_mask in zip(actual[cut:], expected[cut:], strict=True):
        assert torch.equal(mask, expected_mask)
    for at_tokens, expected_at_tokens in zip(
        inputs.at_tokens(actual[:cut]), inputs.at_tokens(expected[:cut]), strict=True
    ):
        torch.testing.assert_close(at_tokens, expected_at_tokens, rtol=0, atol=1e-5)


def test_routers_decide_in_these_tests(built: Built, model: PreTrainedModel) -> None:
    masks = built.run(make_inputs(model, 3, 7, 5))[1 + 2 * NUM_LAYERS :]
    assert all(0 < int(mask.sum()) < mask.numel() for mask in masks)


def test_thresholds_that_are_not_fed_are_those_stored(built: Built, model: PreTrainedModel) -> None:
    inputs, stored = make_inputs(model, 3, 7, 5), np.array(STORED[: len(built.gates)], np.float32)
    torch.testing.assert_close(built.run(inputs), built.run(inputs, stored), rtol=0, atol=0)
    assert not torch.equal(built.run(inputs)[0], built.run(inputs, np.zeros_like(stored))[0])


def test_an_override_lasts_for_one_call(built: Built, model: PreTrainedModel) -> None:
    inputs, override = make_inputs(model, 2, 4, 0), np.full(len(built.gates), 2.0, np.float32)
    before = built.run(inputs)
    built.run(inputs, override)
    torch.testing.assert_close(built.run(inputs), before, rtol=0, atol=0)


def test_inputs_and_outputs_have_the_names_that_runtimes_know(built: Built, model: PreTrainedModel) -> None:
    heads = getattr(model.config, "num_key_value_heads", model.config.num_attention_heads)
    size = model.config.hidden_size // model.config.num_attention_heads
    tokens, past, total = ["batch", "sequence"], [heads, "past_sequence", size], [heads, "total_sequence", size]
    expected: dict[str, tuple[str, list[str | int]]] = {
        "input_ids": ("tensor(int64)", [*tokens]),
        "attention_mask": ("tensor(int64)", ["batch", "total_sequence"]),
        "position_ids": ("tensor(int64)", [*tokens]),
    }
    expected |= {name: ("tensor(float)", ["batch", *past]) for name in INPUTS[3:]}
    assert {value.name: (value.type, value.shape) for value in built.session.get_inputs()} == expected
    assert [value.name for value in built.session.get_inputs()] == INPUTS

    (optional,) = built.session.get_overridable_initializers()
    assert (optional.name, optional.type, optional.shape) == ("routing_threshold", "tensor(float)", [len(built.gates)])

    presents = [name.replace("past_key_values", "present") for name in INPUTS[3:]]
    routing = [f"routing.{name_of(layers)}" for layers in built.gates]
    expected = {"logits": ("tensor(float)", [*tokens, VOCAB_SIZE])}
    expected |= {name: ("tensor(float)", ["batch", *total]) for name in presents}
    expected |= {name: ("tensor(bool)", [*tokens]) for name in routing}
    assert {value.name: (value.type, value.shape) for value in built.session.get_outputs()} == expected
    assert [value.name for value in built.session.get_outputs()] == ["logits", *presents, *routing]


def test_every_gate_is_one_if_of_the_main_graph(built: Built) -> None:
    assert [node.name for node in built.conditionals] == [f"blocks.{name_of(layers)}.if" for layers in built.gates]
    assert operators(built.model.graph).count("If") == len(built.gates)


def test_is_plain_onnx(built: Built) -> None:
    onnx.checker.check_model(ir.to_proto(built.model), full_check=True)
    assert built.model.opset_imports == {"": 23}
    assert not built.model.functions


def weights_read(graph: ir.Graph) -> set[ir.Value]:
    """The matrices that the nodes of a branch multiply by."""
    values = {value for node in graph for value in node.inputs if value is not None and value.is_initializer()}
    return {value for value in values if value.shape is not None and len(value.shape) == 2}


def test_skip_branch_holds_the_projections_of_keys_and_values_and_the_adapter_alone(built: Built) -> None:
    for node in built.conditionals:
        executed, skipped = (weights_read(node.attributes[name].as_graph()) for name in ("then_branch", "else_branch"))
        assert skipped < executed
        names = {str(value.name).removesuffix(".weight").rpartition(".")[2] for value in skipped}
        assert names - {"down", "up"} in ({"k_proj", "v_proj"}, {"c_attn"})
        assert ("down" in names) == bool(built.adapters)


def test_nothing_is_left_to_hoist_or_to_transpose(built: Built) -> None:
    assert not HoistShared()(built.model).modified
    assert not PretransposeWeights()(built.model).modified


def test_every_weight_is_stored_once(built: Built) -> None:
    """In whichever layout, a tied embedding too; routers may be joined."""
    weights = [parameter for name, parameter in built.gm.named_parameters() if ".decide." not in name]
    parameters = {parameter for parameter in weights if parameter.dim() == 2}
    stored = [value.const_value for value in built.model.graph.initializers.values()]
    matrices = [tensor.numpy() for tensor in stored if tensor is not None and len(tensor.shape) == 2]

    def is_same(matrix: np.ndarray, parameter: torch.nn.Parameter) -> bool:
        weight = parameter.detach().numpy()
        return np.array_equal(matrix, weight) or np.array_equal(matrix, weight.T)

    assert all(sum(is_same(matrix, parameter) for matrix in matrices) == 1 for parameter in parameters)
    size = sum(tensor.size for tensor in stored if tensor is not None)
    assert size <= sum(parameter.numel() for parameter in built.gm.parameters()) + 200


@pytest.mark.parametrize("layer_norm", [True, False])
def test_a_linear_router_leaves_four_operators_a_gate(layer_norm: bool) -> None:
    """Once nobody asks for routing masks: the norm, the product, its comparison, whether any token needs the layers."""
    routers: dict[int, nn.Module] = {}
    for layer in (0, 2):
        routers[layer] = DepthRouter(HIDDEN_SIZE, 0, dropout=0.0, layer_norm=layer_norm, init_bias=0.0)
    gm = lower_gates(hard_graph("llama", routers, [range(2), range(2, 3)]))
    nodes = [node.op_type for node in build_model(gm).graph]
    first, second = (index for index, name in enumerate(nodes) if name == "If")
    decided = ["LayerNormalization"] * layer_norm + ["MatMul", "Greater", "ReduceMax"]
    assert nodes[first + 1 : second] == decided
    assert nodes.count("ReduceMax") == 2


@pytest.mark.parametrize("router_hidden_size", [0, 8])
def test_gates_decided_at_once_have_the_operators_of_one(router_hidden_size: int) -> None:
    """And two splits: of who is open, and of what is needed."""
    routers = random_routers(range(NUM_LAYERS), router_hidden_size=router_hidden_size)
    model = build_model(lower_gates(hard_graph("llama", routers, gates_per_decision=2)))
    nodes = [node.op_type for node in model.graph]
    score = ["MatMul", "Add", "Sigmoid", "Mul", "MatMul"] if router_hidden_size else ["MatMul"]
    first, second, third = (index for index, name in enumerate(nodes) if name == "If")
    decided = ["LayerNormalization", *score, "Greater", "ReduceMax"]
    assert [name for name in nodes[:first] if name != "Slice"][-len(decided) - 2 :] == [*decided, "Split", "Split"]
    assert second == first + 1
    assert nodes[second + 1 : third] == [name for name in decided if name != "Add"]
    (split,) = (node for node in model.graph if node.outputs[0].name == "decisions.0,1.2")
    assert split.op_type == "Split"
    for value, layer in zip(split.outputs, (0, 1), strict=True):
        assert [use.node.name for use in value.uses()] == [f"blocks.{layer}.if"]


@torch.no_grad()
def test_a_dense_graph_has_no_if_and_no_threshold() -> None:
    dense = outlined_graph("llama")
    built = build(dense, ())
    assert "If" not in operators(built.model.graph)
    assert not built.session.get_overridable_initializers()
    assert [value.name for value in built.session.get_inputs()] == INPUTS
    assert [value.name for value in built.session.get_outputs()][-1] == f"present.{NUM_LAYERS - 1}.value"
    for past_length in (0, 4):
        inputs = make_inputs(shared_model("llama"), 2, 3, past_length, "left")
        expected, actual = inputs.at_tokens(dense(*inputs.flat)), inputs.at_tokens(built.run(inputs))
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
