import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx, nn
from transformers import PreTrainedModel

from modcompile.errors import UnsupportedModelError
from modcompile.passes import harden_gates, insert_depth_gates, lower_gates, outline_blocks
from modcompile.passes.extract_subgraph import get_attribute
from modcompile.passes.outlined_form import gated_layers
from modcompile.routers import SoftGate
from modcompile.tracing import find_layers
from tests.model_inputs import make_inputs
from tests.passes.forced_routing import ForcedRouter, force
from tests.passes.routing_cases import ROUTED_LAYERS, RoutingCase, routing_cases
from tests.passes.toy_stacks import SIZE, Stack, trace
from tests.tiny_graphs import hard_graph, random_routers

# What a block needs for its keys and values: the norm before attention, and the projections that make them.
_CACHE_UPDATE = {
    "llama": {"input_layernorm.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"},
    "mistral": {"input_layernorm.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"},
    "qwen2": {"input_layernorm.weight"}
    | {f"self_attn.{part}_proj.{kind}" for part in "kv" for kind in ("weight", "bias")},
    "opt": {f"self_attn_layer_norm.{kind}" for kind in ("weight", "bias")}
    | {f"self_attn.{part}_proj.{kind}" for part in "kv" for kind in ("weight", "bias")},
    "gpt2": {f"{part}.{kind}" for part in ("ln_1", "attn.c_attn") for kind in ("weight", "bias")},
}


@pytest.fixture(scope="module")
def hard(architecture: str) -> fx.GraphModule:
    """A hard graph for all cases; each writes its routers and thresholds into it."""
    return hard_graph(architecture, random_routers(ROUTED_LAYERS))


@pytest.fixture(scope="module")
def lowered(hard: fx.GraphModule) -> fx.GraphModule:
    """The lowered one, with the same routers."""
    return lower_gates(hard)


@pytest.fixture(scope="module")
def forced(architecture: str) -> fx.GraphModule:
    """A lowered graph whose routing masks the cases set."""
    return lower_gates(hard_graph(architecture, {layer: ForcedRouter() for layer in ROUTED_LAYERS}))


@given(case=routing_cases(), threshold=st.sampled_from([None, 0.0, 2.0]))
@torch.no_grad()
def test_keeps_every_output(
    hard: fx.GraphModule,
    lowered: fx.GraphModule,
    model: PreTrainedModel,
    case: RoutingCase,
    threshold: float | None,
) -> None:
    inputs = case.inputs(model)
    case.load(hard)
    if threshold is not None:
        hard.get_buffer("routing_threshold").fill_(threshold)
    lowered.get_buffer("routing_threshold").copy_(hard.get_buffer("routing_threshold"))
    actual, expected = lowered(*inputs.flat), hard(*inputs.flat)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@given(case=routing_cases(), other_seed=st.integers(0, 2**16))
@torch.no_grad()
def test_a_row_does_not_notice_whether_another_needs_the_layer(
    forced: fx.GraphModule, model: PreTrainedModel, case: RoutingCase, other_seed: int
) -> None:
    inputs, first_row = case.inputs(model), torch.arange(case.batch).view(-1, 1, 1) == 0
    results = []
    for others in (True, False):
        is_open = {layer: torch.where(first_row, mask, others) for layer, mask in case.is_open().items()}
        force(forced, is_open)
        outputs = forced(*inputs.with_other_rows(0, other_seed).flat)
        results.append(inputs.row(0).at_tokens([output[:1] for output in outputs]))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("tokens", "executed"),
    [
        pytest.param([[False, False, False], [False, False, False]], 0, id="no token"),
        pytest.param([[False, False, False], [False, False, True]], 1, id="one token"),
        pytest.param([[True, True, True], [True, True, True]], 1, id="all tokens"),
        pytest.param([[True, False, False], [True, True, False]], 0, id="padding only"),
    ],
)
@torch.no_grad()
def test_executes_a_block_only_if_a_token_needs_it(
    forced: fx.GraphModule, model: PreTrainedModel, tokens: list[list[bool]], executed: int
) -> None:
    inputs = make_inputs(model, 2, 3, 0, "left")  # one padded position in the first row, two in the second
    calls: list[nn.Module] = []
    branch = forced.get_submodule("blocks.2.then_branch")
    force(forced, dict.fromkeys(ROUTED_LAYERS, torch.tensor(tokens).unsqueeze(-1)))
    hook = branch.register_forward_pre_hook(lambda module, _: calls.append(module))
    forced(*inputs.flat)
    hook.remove()
    assert len(calls) == executed


def test_skip_branch_holds_only_what_keys_and_values_need(
    architecture: str, lowered: fx.GraphModule, model: PreTrainedModel
) -> None:
    for layer in ROUTED_LAYERS:
        block, own = lowered.get_submodule(f"blocks.{layer}"), find_layers(model)[layer]
        held = dict(block.get_submodule("else_branch").named_parameters())
        assert held.keys() == _CACHE_UPDATE[architecture]
        assert all(held[name] is get_attribute(own, name) for name in held)
        executed = dict(block.get_submodule("then_branch.block").named_parameters())
        assert executed.keys() == dict(own.named_parameters()).keys()


def test_skip_branch_has_no_attention(lowered: fx.GraphModule) -> None:
    skip = lowered.get_submodule("blocks.0.else_branch")
    assert isinstance(skip, fx.GraphModule)
    assert not [node for node in skip.graph.nodes if "attention" in str(node.target)]


def test_layers_without_a_router_stay_as_they_are(outlined: fx.GraphModule, lowered: fx.GraphModule) -> None:
    assert lowered.get_submodule("blocks.1") is outlined.get_submodule("blocks.1")
    assert gated_layers(lowered) == [range(layer, layer + 1) for layer in ROUTED_LAYERS]


def test_refuses_a_block_that_writes_in_place() -> None:
    class Writing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(SIZE, SIZE)

        def forward(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return self.linear(hidden).mul_(mask)

    class Masked(Stack):
        def run_blocks(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                hidden = block(hidden, mask)
            return hidden

    outlined = outline_blocks(trace(Masked(Writing(), Writing())))
    hard = harden_gates(insert_depth_gates(outlined, {1: nn.Linear(SIZE, 1)}, SoftGate()))
    with pytest.raises(UnsupportedModelError, match=r"^a decoder block writes to a tensor in place \(aten\.mul_"):
        lower_gates(hard)
