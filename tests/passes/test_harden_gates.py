import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import fx, nn
from transformers import PreTrainedModel

from modcompile.passes import harden_gates, insert_depth_gates
from modcompile.passes.outlined_form import gated_layers
from modcompile.routers import StraightThroughGate
from tests.model_inputs import kernel_atol
from tests.passes.forced_routing import ForcedRouter, force
from tests.passes.routing_cases import ROUTED_LAYERS, RoutingCase, routing_cases
from tests.routed_reference import choose, decide, run_reference, skip
from tests.tiny_graphs import hard_graph, random_adapters, random_routers

_ATOL = 1e-5


@pytest.fixture(scope="module")
def hard(architecture: str) -> fx.GraphModule:
    """A hard graph for all cases; each writes its routers and thresholds into it."""
    return hard_graph(architecture, random_routers(ROUTED_LAYERS))


@pytest.fixture(scope="module")
def forced(architecture: str) -> fx.GraphModule:
    """A hard graph whose routing masks the cases set."""
    return hard_graph(architecture, {layer: ForcedRouter() for layer in ROUTED_LAYERS})


@pytest.fixture(scope="module")
def with_adapters(architecture: str) -> tuple[fx.GraphModule, dict[int, nn.Module]]:
    """The same with a skip path, and what that is at each routed layer."""
    adapters = random_adapters(ROUTED_LAYERS)
    return hard_graph(architecture, {layer: ForcedRouter() for layer in ROUTED_LAYERS}, adapters=adapters), adapters


@given(case=routing_cases())
@torch.no_grad()
def test_threshold_zero_equals_dense(
    hard: fx.GraphModule, model: PreTrainedModel, outlined: fx.GraphModule, case: RoutingCase
) -> None:
    inputs = case.inputs(model)
    case.load(hard)
    hard.get_buffer("routing_threshold").zero_()
    *actual, first, second = hard(*inputs.flat)
    torch.testing.assert_close(tuple(actual), outlined(*inputs.flat), rtol=0, atol=0)
    assert torch.equal(first.squeeze(-1), inputs.is_token)
    assert torch.equal(second.squeeze(-1), inputs.is_token)


@pytest.mark.parametrize("threshold", [1.0, 1.5])
@given(case=routing_cases())
@torch.no_grad()
def test_threshold_of_one_or_more_skips_every_routed_layer(
    hard: fx.GraphModule, model: PreTrainedModel, case: RoutingCase, threshold: float
) -> None:
    inputs = case.inputs(model)
    case.load(hard)
    hard.get_buffer("routing_threshold").fill_(threshold)
    *actual, first, second = hard(*inputs.flat)
    expected = run_reference(model, inputs, dict.fromkeys(ROUTED_LAYERS, skip))
    torch.testing.assert_close(tuple(actual), expected, rtol=0, atol=kernel_atol(model, case.length))
    assert not first.any()
    assert not second.any()


@given(case=routing_cases())
@torch.no_grad()
def test_each_token_is_executed_or_kept(forced: fx.GraphModule, model: PreTrainedModel, case: RoutingCase) -> None:
    inputs, is_open = case.inputs(model), case.is_open()
    force(forced, is_open)
    *actual, first, second = forced(*inputs.flat)
    executed = {layer: mask & inputs.is_token.unsqueeze(-1) for layer, mask in is_open.items()}
    expected = run_reference(model, inputs, {layer: choose(mask) for layer, mask in executed.items()})
    torch.testing.assert_close(tuple(actual), expected, rtol=0, atol=kernel_atol(model, case.length))
    for mask, layer in zip((first, second), ROUTED_LAYERS, strict=True):
        assert torch.equal(mask, executed[layer])


@given(case=routing_cases())
@torch.no_grad()
def test_each_token_is_executed_or_goes_through_the_adapter(
    with_adapters: tuple[fx.GraphModule, dict[int, nn.Module]], model: PreTrainedModel, case: RoutingCase
) -> None:
    hard, adapters = with_adapters
    inputs, is_open = case.inputs(model), case.is_open()
    force(hard, is_open)
    is_token = inputs.is_token.unsqueeze(-1)
    mixes = {layer: choose(mask & is_token, adapters[layer]) for layer, mask in is_open.items()}
    expected = run_reference(model, inputs, mixes)
    torch.testing.assert_close(tuple(hard(*inputs.flat)[:-2]), expected, rtol=0, atol=_ATOL)


@given(case=routing_cases())
@torch.no_grad()
def test_decides_by_gate_above_the_threshold_of_its_layer(
    hard: fx.GraphModule, model: PreTrainedModel, case: RoutingCase
) -> None:
    inputs = case.inputs(model)
    mixes, gates = decide(case.routers(), case.thresholds, inputs)
    expected = run_reference(model, inputs, mixes)
    assume(not case.is_near_threshold(gates))
    case.load(hard)
    *actual, first, second = hard(*inputs.flat)
    torch.testing.assert_close(tuple(actual), expected, rtol=0, atol=kernel_atol(model, case.length))
    for mask, gate, threshold in zip((first, second), gates, case.threshold, strict=True):
        assert torch.equal(mask, (gate > threshold) & inputs.is_token.unsqueeze(-1))


@given(case=routing_cases(min_length=2), cuts=st.sets(st.integers(1, 6)))
@torch.no_grad()
def test_cached_equals_uncached(
    hard: fx.GraphModule, model: PreTrainedModel, case: RoutingCase, cuts: set[int]
) -> None:
    inputs = case.inputs(model)
    mixes, gates = decide(case.routers(), case.thresholds, inputs)
    run_reference(model, inputs, mixes)
    assume(not case.is_near_threshold(gates))
    case.load(hard)
    whole = hard(*inputs.flat)

    ends = [*sorted(cut for cut in cuts if cut < case.length), case.length]
    past, logits, masks = inputs.past, [], []
    for start, stop in zip([0, *ends], ends, strict=False):
        outputs = hard(*inputs.step(start, stop, past).flat)
        presents = outputs[1:-2]
        past = list(zip(presents[::2], presents[1::2], strict=True))
        logits.append(outputs[0])
        masks.append(outputs[-2:])
    stepped = (torch.cat(logits, 1), *presents, *(torch.cat(parts, 1) for parts in zip(*masks, strict=True)))
    torch.testing.assert_close(inputs.at_tokens(stepped), inputs.at_tokens(whole), rtol=0, atol=_ATOL)


@given(case=routing_cases(), other_seed=st.integers(0, 2**16))
@torch.no_grad()
def test_a_row_does_not_depend_on_the_others(
    hard: fx.GraphModule, model: PreTrainedModel, case: RoutingCase, other_seed: int
) -> None:
    inputs = case.inputs(model)
    case.load(hard)
    others = inputs.with_other_rows(0, other_seed)
    for actual, expected in zip(hard(*others.flat), hard(*inputs.flat), strict=True):
        assert torch.equal(actual[0], expected[0])


@given(case=routing_cases(max_past=0), other_seed=st.integers(0, 2**16))
@torch.no_grad()
def test_a_row_does_not_depend_on_what_stands_in_padding(
    hard: fx.GraphModule, model: PreTrainedModel, case: RoutingCase, other_seed: int
) -> None:
    inputs = case.inputs(model)
    case.load(hard)
    others = inputs.with_other_padding(other_seed)
    for actual, expected in zip(
        inputs.at_tokens(hard(*others.flat)), inputs.at_tokens(hard(*inputs.flat)), strict=True
    ):
        assert torch.equal(actual, expected)


@given(case=routing_cases(max_past=0))
@torch.no_grad()
def test_a_row_alone_and_unpadded_equals_itself_in_a_batch(
    hard: fx.GraphModule, model: PreTrainedModel, case: RoutingCase
) -> None:
    inputs = case.inputs(model)
    mixes, gates = decide(case.routers(), case.thresholds, inputs)
    run_reference(model, inputs, mixes)
    assume(not case.is_near_threshold(gates))
    case.load(hard)
    together = hard(*inputs.flat)
    for index in range(case.batch):
        row = inputs.row(index)
        alone = row.without_padding()
        actual = alone.at_tokens(hard(*alone.flat))
        expected = row.at_tokens([output[index : index + 1] for output in together])
        torch.testing.assert_close(actual, expected, rtol=0, atol=_ATOL)


@given(case=routing_cases())
@torch.no_grad()
def test_equals_straight_through_gates_at_one_half(
    outlined: fx.GraphModule, model: PreTrainedModel, case: RoutingCase
) -> None:
    inputs = case.inputs(model)
    soft = insert_depth_gates(outlined, case.routers(), StraightThroughGate())
    actual, expected = harden_gates(soft)(*inputs.flat), soft(*inputs.flat)
    torch.testing.assert_close(inputs.at_tokens(actual[:-2]), inputs.at_tokens(expected[:-2]), rtol=0, atol=0)


def test_starts_with_a_threshold_of_one_half_for_each_routed_layer() -> None:
    hard = hard_graph("llama", random_routers([0, 1, 2]))
    assert torch.equal(hard.get_buffer("routing_threshold"), torch.full((3,), 0.5))
    assert gated_layers(hard) == [range(1), range(1, 2), range(2, 3)]


def test_has_no_sigmoid_left() -> None:
    hard = hard_graph("llama", random_routers(ROUTED_LAYERS))
    assert not [name for name, _ in hard.named_modules() if name.endswith("gate")]
