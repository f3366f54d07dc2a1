import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import fx
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from modcompile.passes import group_blocks, insert_depth_gates, lower_gates
from modcompile.passes.outlined_form import block_calls, gated_layers, is_group, layers_called, results
from modcompile.routed_graph import trace_outlined
from modcompile.routers import SoftGate, StraightThroughGate
from tests.model_inputs import kernel_atol, make_inputs, run_model
from tests.passes.forced_routing import ConstantGate
from tests.passes.routing_cases import ROUTED_LAYERS, RoutingCase, routing_cases
from tests.routed_reference import decide, run_reference, skip
from tests.tiny_graphs import hard_graph, outlined_graph, random_routers, shared_model

# As many gates as the cases have, one of them for two layers.
_GROUPS = (range(2), range(2, 3))
_FOLLOWERS = (1,)
_ATOL = 1e-5


@pytest.fixture(scope="module")
def lowered() -> fx.GraphModule:
    """A lowered graph for all cases; each writes its routers and thresholds into it."""
    return lower_gates(hard_graph("llama", random_routers(ROUTED_LAYERS), _GROUPS))


@pytest.mark.parametrize("groups", [[range(2)], [range(1, 3)], [range(3)], [range(1), range(1, 3)]], ids=str)
@pytest.mark.parametrize("past_length", [0, 5])
@torch.no_grad()
def test_keeps_every_output(
    model: PreTrainedModel, outlined: fx.GraphModule, groups: list[range], past_length: int
) -> None:
    inputs = make_inputs(model, 2, 4, past_length, "left")
    grouped = group_blocks(outlined, groups)
    torch.testing.assert_close(grouped(*inputs.flat), outlined(*inputs.flat), rtol=0, atol=0)


@torch.no_grad()
def test_keeps_every_output_without_a_cache() -> None:
    outlined = outlined_graph("llama", use_cache=False)
    inputs = make_inputs(shared_model("llama"), 2, 4, 0, "left")
    actual = group_blocks(outlined, [range(3)])(*inputs.tokens)
    torch.testing.assert_close(actual, outlined(*inputs.tokens), rtol=0, atol=0)


@torch.no_grad()
def test_each_member_keeps_its_own_attention_mask() -> None:
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
        layer_types=["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
    )
    base = Qwen2ForCausalLM(config).eval()
    inputs = make_inputs(base, 2, 9, 0, "left")
    actual = group_blocks(trace_outlined(base), [range(1, 4)])(*inputs.flat)
    torch.testing.assert_close(inputs.at_tokens(actual), inputs.at_tokens(run_model(base, inputs)), rtol=0, atol=0)


def test_a_group_calls_the_blocks_and_does_nothing_else(outlined: fx.GraphModule) -> None:
    grouped = group_blocks(outlined, [range(1), range(1, 3)])
    first, second = block_calls(grouped.graph)
    assert [layers_called(call) for call in (first, second)] == [range(1), range(1, 3)]
    assert grouped.get_submodule("blocks.0") is outlined.get_submodule("blocks.0")
    assert not is_group(grouped.get_submodule("blocks.0"))
    group = grouped.get_submodule("blocks.1-2")
    assert is_group(group)
    assert [group.get_submodule(name) for name in ("0", "1")] == [
        outlined.get_submodule(f"blocks.{layer}") for layer in (1, 2)
    ]
    assert len(results(second)) == 1 + 2 * 2
    assert gated_layers(grouped) == []


@pytest.mark.parametrize("value", [0.0, 0.25, 1.0])
@torch.no_grad()
def test_one_gate_mixes_each_of_its_blocks(model: PreTrainedModel, outlined: fx.GraphModule, value: float) -> None:
    def mix(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        return value * after + (1 - value) * before

    inputs = make_inputs(model, 3, 4, 5, "left")
    expected = run_reference(model, inputs, dict.fromkeys(range(3), mix))
    soft = insert_depth_gates(group_blocks(outlined, _GROUPS), random_routers(ROUTED_LAYERS), ConstantGate(value))
    assert gated_layers(soft) == list(_GROUPS)
    *actual, first, second = soft(*inputs.flat)
    torch.testing.assert_close(tuple(actual), expected, rtol=0, atol=kernel_atol(model, 4))
    assert torch.equal(first, torch.full((3, 4, 1), value))
    assert torch.equal(second, first)


@given(case=routing_cases())
@torch.no_grad()
def test_one_gate_decides_for_all_of_its_blocks(lowered: fx.GraphModule, case: RoutingCase) -> None:
    model = shared_model("llama")
    inputs = case.inputs(model)
    mixes, gates = decide(case.routers(), case.thresholds, inputs, _FOLLOWERS)
    expected = run_reference(model, inputs, mixes)
    assume(not case.is_near_threshold(gates))
    case.load(lowered)
    *actual, first, second = lowered(*inputs.flat)
    torch.testing.assert_close(tuple(actual), expected, rtol=0, atol=kernel_atol(model, case.length))
    for mask, gate, threshold in zip((first, second), gates, case.threshold, strict=True):
        assert torch.equal(mask, (gate > threshold) & inputs.is_token.unsqueeze(-1))


@given(case=routing_cases())
@torch.no_grad()
def test_skipped_blocks_have_the_keys_of_an_unchanged_hidden_state(lowered: fx.GraphModule, case: RoutingCase) -> None:
    model = shared_model("llama")
    inputs = case.inputs(model)
    case.load(lowered)
    lowered.get_buffer("routing_threshold").fill_(2.0)
    *actual, _, _ = lowered(*inputs.flat)
    expected = run_reference(model, inputs, dict.fromkeys(range(3), skip))
    torch.testing.assert_close(tuple(actual), expected, rtol=0, atol=kernel_atol(model, case.length))


@given(case=routing_cases(min_length=2), cuts=st.sets(st.integers(1, 6)))
@torch.no_grad()
def test_cached_equals_uncached(lowered: fx.GraphModule, case: RoutingCase, cuts: set[int]) -> None:
    """A token that is skipped beside one that is executed has the keys that it has when it is skipped alone."""
    model = shared_model("llama")
    inputs = case.inputs(model)
    mixes, gates = decide(case.routers(), case.thresholds, inputs, _FOLLOWERS)
    run_reference(model, inputs, mixes)
    assume(not case.is_near_threshold(gates))
    case.load(lowered)
    whole = lowered(*inputs.flat)

    ends = [*sorted(cut for cut in cuts if cut < case.length), case.length]
    past, logits = inputs.past, []
    for start, stop in zip([0, *ends], ends, strict=False):
        first, *presents, _, _ = lowered(*inputs.step(start, stop, past).flat)
        past = list(zip(presents[::2], presents[1::2], strict=True))
        logits.append(first)
    stepped = inputs.at_tokens([torch.cat(logits, 1), *presents])
    torch.testing.assert_close(stepped, inputs.at_tokens(whole[:-2]), rtol=0, atol=_ATOL)


@given(case=routing_cases(), other_seed=st.integers(0, 2**16))
@torch.no_grad()
def test_a_row_does_not_depend_on_the_others(lowered: fx.GraphModule, case: RoutingCase, other_seed: int) -> None:
    inputs = case.inputs(shared_model("llama"))
    case.load(lowered)
    others = inputs.with_other_rows(0, other_seed)
    results = [inputs.row(0).at_tokens([output[:1] for output in lowered(*each.flat)]) for each in (others, inputs)]
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=_ATOL)


def test_skip_branch_of_a_group_holds_only_what_keys_and_values_need(lowered: fx.GraphModule) -> None:
    skipped = lowered.get_submodule("blocks.0-1.else_branch")
    names = {name for name, _ in skipped.named_parameters()}
    held = ("input_layernorm.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight")
    assert names == {f"{index}.{name}" for index in range(2) for name in held}


@pytest.mark.parametrize("gate", [SoftGate(), StraightThroughGate()], ids=["soft", "straight_through"])
def test_gradient_reaches_the_routers(gate: SoftGate | StraightThroughGate) -> None:
    routers = random_routers(ROUTED_LAYERS)
    soft = insert_depth_gates(group_blocks(outlined_graph("llama", use_cache=False), _GROUPS), routers, gate)
    inputs = make_inputs(shared_model("llama"), 2, 6, 0, "right")
    parameters = [parameter for router in routers.values() for parameter in router.parameters()]
    for gradient in torch.autograd.grad(soft(*inputs.tokens)[0].logsumexp(-1).sum(), parameters):
        assert gradient.isfinite().all()
        assert gradient.abs().max() > 0
