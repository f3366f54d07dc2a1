import pytest
import torch
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from modcompile.config import GateKind, RouterConfig
from modcompile.errors import ConfigError, UnsupportedModelError
from modcompile.passes.outlined_form import block_calls, gated_layers
from modcompile.routed_graph import build_routed, insert_routers, trace_outlined
from modcompile.routers import DepthRouter, DepthScore, HardConcreteGate, SoftGate, StraightThroughGate
from modcompile.skip_adapters import LowRankAdapter
from modcompile.tracing import find_layers
from tests.model_inputs import make_inputs, run_model
from tests.tiny_models import tiny_model


@pytest.mark.parametrize("use_cache", [True, False])
def test_traces_two_layers_and_stamps_out_all(use_cache: bool) -> None:
    base = tiny_model("llama", num_layers=5)
    graph = trace_outlined(base, use_cache=use_cache)
    assert [str(call.target) for call in block_calls(graph.graph)] == [f"blocks.{index}" for index in range(5)]
    inputs = make_inputs(base, 2, 4, 3 if use_cache else 0, "left")
    with torch.no_grad():
        actual = graph(*(inputs.flat if use_cache else inputs.tokens))
    expected = run_model(base, inputs, use_cache=use_cache)
    torch.testing.assert_close(inputs.at_tokens(actual), inputs.at_tokens(expected), rtol=0, atol=0)


def test_leaves_the_model_as_deep_as_it_was() -> None:
    base = tiny_model("llama", num_layers=4)
    trace_outlined(base)
    assert len(find_layers(base)) == 4


def test_traces_layers_that_differ_whole() -> None:
    """Where every second layer attends to a window, what two layers do can't be stamped out for four."""
    torch.manual_seed(0)
    config = Qwen2Config(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
        initializer_range=0.2,
        use_sliding_window=True,
        sliding_window=4,
        layer_types=["full_attention", "full_attention", "sliding_attention", "full_attention"],
    )
    base = Qwen2ForCausalLM(config).eval()
    graph = trace_outlined(base)
    inputs = make_inputs(base, 2, 9, 0, "left")
    with torch.no_grad():
        actual = graph(*inputs.flat)
    torch.testing.assert_close(inputs.at_tokens(actual), inputs.at_tokens(run_model(base, inputs)), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("gate", "kind"),
    [("soft", SoftGate), ("straight_through", StraightThroughGate), ("hard_concrete", HardConcreteGate)],
)
def test_inserts_the_configured_routers(gate: GateKind, kind: type[nn.Module]) -> None:
    config = RouterConfig(
        router_hidden_size=5, router_dropout=0.25, router_start=1, gate=gate, layer_norm_router_input=False
    )
    model = build_routed(tiny_model("llama"), config)
    assert model.routed_layers == (1, 2)
    assert gated_layers(model.graph) == [range(1, 2), range(2, 3)]
    for layer, router in model.routers.items():
        assert isinstance(router, DepthRouter)
        assert isinstance(router.score, DepthScore)
        assert router.score.up.out_features == 5
        assert router.score.dropout.p == 0.25
        assert isinstance(router.score.norm, nn.Identity)
        assert isinstance(model.graph.get_submodule(f"blocks.{layer}.gate"), kind)


def test_routers_have_the_dtype_of_the_model() -> None:
    base = tiny_model("llama")
    nn.Module.to(base, torch.bfloat16)
    model = build_routed(base, RouterConfig(router_hidden_size=5))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("blocks_per_gate", [1, 2])
def test_every_routed_layer_has_an_adapter_of_its_own(blocks_per_gate: int) -> None:
    config = RouterConfig(router_start=1, blocks_per_gate=blocks_per_gate, skip_adapter="low_rank", adapter_rank=5)
    model = build_routed(tiny_model("llama"), config)
    assert list(model.adapters) == [1, 2]
    first, second = model.adapters.values()
    assert isinstance(first, LowRankAdapter)
    assert first.down.out_features == 5
    assert first is not second
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert trained == {id(parameter) for parameter in model.router_parameters()}
    assert {id(parameter) for parameter in first.parameters()} < trained


def test_adapters_have_the_dtype_of_the_model_and_stay_when_it_changes() -> None:
    model = build_routed(tiny_model("llama"), RouterConfig(router_hidden_size=5, skip_adapter="scale"))
    adapter = model.adapters[1]
    nn.init.constant_(adapter.get_parameter("shift"), 0.5)
    nn.Module.to(model, torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.adapters[1].get_parameter("shift").unique().tolist() == [0.5]


def test_parameters_of_the_base_are_shared_and_frozen() -> None:
    base = tiny_model("gpt2")
    model = build_routed(base, RouterConfig(router_hidden_size=5))
    routers = {id(parameter) for parameter in model.router_parameters()}
    assert {id(parameter) for parameter in model.parameters()} == routers | {id(p) for p in base.parameters()}
    assert {id(parameter) for parameter in model.parameters() if parameter.requires_grad} == routers
    assert not model.training


def test_refuses_a_selection_of_no_layer() -> None:
    dense = trace_outlined(tiny_model("llama"))
    with pytest.raises(ConfigError, match="no layer is left to route"):
        insert_routers(dense, RouterConfig(lock_first_layers=2, lock_last_layers=1))


def test_refuses_a_model_of_one_layer() -> None:
    with pytest.raises(UnsupportedModelError, match="no list of two or more decoder layers"):
        build_routed(tiny_model("llama", num_layers=1), RouterConfig())
