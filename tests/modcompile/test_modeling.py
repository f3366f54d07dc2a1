import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from modcompile import load_with_routers, set_router_mode
from modcompile.config import RouterConfig
from modcompile.errors import ConfigError
from modcompile.modeling import RoutedForCausalLM
from modcompile.routed_graph import build_routed
from modcompile.tracing import from_cache, to_cache
from tests.model_inputs import Padding, kernel_atol, make_inputs, run_model
from tests.routed_reference import decide, run_reference, skip
from tests.tiny_models import tiny_model
from tests.tiny_routed import GATED_LAYERS, ROUTED_LAYERS, tiny_base, tiny_decided_at_once, tiny_grouped, tiny_routed

_CONFIG = RouterConfig(router_hidden_size=8)

_SEARCHES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 3},
    "sampling": {"do_sample": True, "temperature": 0.7},
}


@pytest.fixture(scope="module")
def dense(architecture: str) -> PreTrainedModel:
    return tiny_model(architecture)


@pytest.fixture(scope="module")
def untrained(dense: PreTrainedModel) -> RoutedForCausalLM:
    """Every layer routed, by routers that never decided anything; hard."""
    model = build_routed(dense, _CONFIG)
    model.set_router_mode(0.5)
    return model


@pytest.fixture
def routed() -> RoutedForCausalLM:
    """Its routers execute some tokens and skip others."""
    model = tiny_routed("straight_through")
    model.set_router_mode(0.5)
    model.reset_usage()
    return model


@pytest.fixture
def grouped() -> RoutedForCausalLM:
    """The same with linear routers, of which the first decides on layers 0 and 1."""
    model = tiny_grouped("straight_through")
    model.set_router_mode(0.5)
    model.reset_usage()
    return model


def _generate(model: Any, prompt: torch.Tensor, mask: torch.Tensor, **options: Any) -> list[list[int]]:
    torch.manual_seed(0)
    tokens: list[list[int]] = model.generate(
        prompt, attention_mask=mask, max_new_tokens=6, pad_token_id=0, **options
    ).tolist()
    return tokens


def _logits(model: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(*args, **kwargs).logits
    return logits


@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_untrained_is_the_dense_model(dense: PreTrainedModel, untrained: RoutedForCausalLM, padding: Padding) -> None:
    inputs = make_inputs(dense, 3, 7, 0, padding)
    expected = run_model(dense, inputs, use_cache=False)
    actual = _logits(untrained, *inputs.tokens)
    torch.testing.assert_close(inputs.at_tokens([actual]), inputs.at_tokens(expected), rtol=0, atol=0)


def test_needs_neither_mask_nor_positions(dense: PreTrainedModel, untrained: RoutedForCausalLM) -> None:
    input_ids = make_inputs(dense, 2, 9, 0).input_ids
    assert torch.equal(_logits(untrained, input_ids), _logits(dense, input_ids))


@pytest.mark.parametrize("length", [1, 3])
def test_goes_on_from_a_cache_as_the_dense_model_does(
    dense: PreTrainedModel, untrained: RoutedForCausalLM, length: int
) -> None:
    inputs = make_inputs(dense, 3, length, 5, "left")
    expected = run_model(dense, inputs)
    cache = to_cache(inputs.past)
    with torch.no_grad():
        output = untrained(*inputs.tokens, past_key_values=cache)
    presents = [tensor for pair in from_cache(cache) for tensor in pair]
    assert output.past_key_values is cache
    actual = inputs.at_tokens([output.logits, *presents])
    torch.testing.assert_close(actual, inputs.at_tokens(expected), rtol=0, atol=kernel_atol(dense, length))


@pytest.mark.parametrize(("search", "use_cache"), [*((search, True) for search in _SEARCHES), ("greedy", False)])
def test_generates_what_the_dense_model_does(
    dense: PreTrainedModel, untrained: RoutedForCausalLM, search: str, use_cache: bool
) -> None:
    inputs = make_inputs(dense, 3, 7, 0, "left")
    options = {**_SEARCHES[search], "use_cache": use_cache}
    expected = _generate(dense, inputs.input_ids, inputs.attention_mask, **options)
    assert _generate(untrained, inputs.input_ids, inputs.attention_mask, **options) == expected


@pytest.mark.parametrize("num_items_in_batch", [None, 5])
def test_loss_is_that_of_the_dense_model(
    dense: PreTrainedModel, untrained: RoutedForCausalLM, num_items_in_batch: int | None
) -> None:
    input_ids = make_inputs(dense, 2, 9, 0).input_ids
    labels = input_ids.clone()
    labels[0, :4] = -100
    options = {"labels": labels, "num_items_in_batch": num_items_in_batch}
    with torch.no_grad():
        assert torch.equal(untrained(input_ids, **options).loss, dense(input_ids, **options).loss)


@pytest.mark.parametrize("options", [{}, {"blocks_per_gate": 2}, {"gates_per_decision": 2}])
def test_changes_its_dtype_as_the_dense_model_does(options: dict[str, Any]) -> None:
    routed: Any = build_routed(tiny_base(), replace(_CONFIG, **options))
    routed.set_router_mode(0.5)
    routed.to(torch.bfloat16)
    dense: Any = tiny_base()
    dense.to(torch.bfloat16)
    inputs = make_inputs(dense, 2, 5, 0, "left")
    assert routed.dtype == torch.bfloat16
    expected = run_model(dense, inputs, use_cache=False)
    assert torch.equal(run_model(routed.base, inputs, use_cache=False)[0], expected[0])
    actual = inputs.at_tokens([_logits(routed, *inputs.tokens)])
    torch.testing.assert_close(actual, inputs.at_tokens(expected), rtol=0, atol=0)
    tokens = [_generate(model, inputs.input_ids, inputs.attention_mask, do_sample=False) for model in (routed, dense)]
    assert tokens[0] == tokens[1]


def test_in_another_dtype_gates_read_what_they_did() -> None:
    routed: Any = build_routed(tiny_base(), replace(_CONFIG, gates_per_decision=3, gate="soft"))
    for index, router in enumerate(routed.routers.values()):
        torch.manual_seed(index)
        torch.nn.init.normal_(router.score.down.weight)
    inputs = make_inputs(routed.base, 2, 5, 0, "left")
    with torch.no_grad():
        before = routed(*inputs.tokens).gates
        after = routed.double()(*inputs.tokens).gates
    for gate, expected in zip(after, before, strict=True):
        assert gate.std() > 0
        torch.testing.assert_close(gate, expected.double(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("search", _SEARCHES)
def test_decided_at_once_generation_with_a_cache_is_that_without(search: str) -> None:
    models = [_hard(tiny_decided_at_once("straight_through", use_cache=use_cache)) for use_cache in (True, False)]
    inputs = make_inputs(models[0].base, 3, 7, 0, "left")
    cached, uncached = (
        _generate(each, inputs.input_ids, inputs.attention_mask, **_SEARCHES[search]) for each in models
    )
    assert cached == uncached
    assert all(0 < ratio < 1 for ratio in models[0].active_ratio_per_layer.values())


def test_takes_along_what_the_trace_recorded_to_another_device() -> None:
    model: Any = build_routed(tiny_base(), _CONFIG, use_cache=False)
    model.to("meta")
    tokens = torch.zeros(2, 3, dtype=torch.long, device="meta")
    assert {output.device.type for output in model.graph(tokens, tokens, tokens)} == {"meta"}


@pytest.mark.parametrize("search", _SEARCHES)
def test_hard_generation_with_a_cache_is_that_without(routed: RoutedForCausalLM, search: str) -> None:
    inputs = make_inputs(routed.base, 3, 7, 0, "left")
    cached = _generate(routed, inputs.input_ids, inputs.attention_mask, **_SEARCHES[search])
    assert 0 < routed.active_ratio < 1
    uncached = _generate(routed, inputs.input_ids, inputs.attention_mask, use_cache=False, **_SEARCHES[search])
    assert cached == uncached
    without = _hard(tiny_routed("straight_through", use_cache=False))
    assert cached == _generate(without, inputs.input_ids, inputs.attention_mask, **_SEARCHES[search])


@pytest.mark.parametrize("search", _SEARCHES)
def test_with_shared_gates_generation_with_a_cache_is_that_without(grouped: RoutedForCausalLM, search: str) -> None:
    inputs = make_inputs(grouped.base, 3, 7, 0, "left")
    cached = _generate(grouped, inputs.input_ids, inputs.attention_mask, **_SEARCHES[search])
    assert all(0 < ratio < 1 for ratio in grouped.active_ratio_per_layer.values())
    without = _hard(tiny_grouped("straight_through", use_cache=False))
    assert cached == _generate(without, inputs.input_ids, inputs.attention_mask, **_SEARCHES[search])


@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_a_shared_gate_decides_for_all_of_its_layers(grouped: RoutedForCausalLM, padding: Padding) -> None:
    inputs = make_inputs(grouped.base, 3, 7, 5, padding)
    thresholds = {0: 0.4, 2: 0.6}
    grouped.set_router_mode(list(thresholds.values()))
    mixes, gates = decide(grouped.routers, thresholds, inputs, followers=(1,))
    expected, *presents = run_reference(grouped.base, inputs, mixes)
    cache = to_cache(inputs.past)
    with torch.no_grad():
        output = grouped(*inputs.tokens, past_key_values=cache)
    actual = [output.logits, *(tensor for pair in from_cache(cache) for tensor in pair)]
    torch.testing.assert_close(actual, [expected, *presents], rtol=0, atol=0)
    for mask, gate, threshold in zip(output.gates, (gates[0], *gates), (0.4, 0.4, 0.6), strict=True):
        assert torch.equal(mask.squeeze(-1), (gate.squeeze(-1) > threshold) & inputs.is_token)


def test_usage_counts_each_layer_of_a_shared_gate(grouped: RoutedForCausalLM) -> None:
    assert (grouped.gated_layers, grouped.routed_layers) == (GATED_LAYERS, (0, 1, 2))
    set_router_mode(grouped, [0.0, 2.0])
    grouped(torch.tensor([[5, 6, 7]]))
    assert grouped.active_ratio_per_layer == {0: 1.0, 1: 1.0, 2: 0.0}
    assert grouped.active_ratio == pytest.approx(2 / 3)


def test_a_row_is_generated_as_it_is_alone(routed: RoutedForCausalLM) -> None:
    inputs = make_inputs(routed.base, 3, 7, 0, "left")
    together = _generate(routed, inputs.input_ids, inputs.attention_mask, do_sample=False)
    for row in range(3):
        alone = inputs.row(row).without_padding()
        (tokens,) = _generate(routed, alone.input_ids, alone.attention_mask, do_sample=False)
        assert together[row][7:] == tokens[alone.input_ids.shape[1] :]


def test_hard_decides_by_router_and_threshold(routed: RoutedForCausalLM) -> None:
    inputs = make_inputs(routed.base, 3, 7, 0, "left")
    thresholds = {0: 0.4, 2: 0.7}
    routed.set_router_mode(list(thresholds.values()))
    mixes, gates = decide(routed.routers, thresholds, inputs)
    expected = run_reference(routed.base, inputs, mixes)[:1]
    with torch.no_grad():
        output = routed(*inputs.tokens)
    torch.testing.assert_close((output.logits,), expected, rtol=0, atol=0)
    for mask, gate, threshold in zip(output.gates, gates, thresholds.values(), strict=True):
        assert torch.equal(mask.squeeze(-1), (gate.squeeze(-1) > threshold) & inputs.is_token)


def test_threshold_of_zero_is_dense_and_one_above_one_skips(routed: RoutedForCausalLM) -> None:
    inputs = make_inputs(routed.base, 3, 7, 0, "left")
    dense, skipped = (run_reference(routed.base, inputs, dict.fromkeys(layers, skip)) for layers in ((), ROUTED_LAYERS))
    for threshold, expected, active_ratio in ((0, dense, 1.0), (1.5, skipped, 0.0)):
        routed.set_router_mode(threshold)
        routed.reset_usage()
        actual = _logits(routed, *inputs.tokens)
        torch.testing.assert_close(inputs.at_tokens([actual]), inputs.at_tokens(expected[:1]), rtol=0, atol=0)
        assert routed.active_ratio == active_ratio


def test_each_layer_may_have_a_threshold_of_its_own(routed: RoutedForCausalLM) -> None:
    set_router_mode(routed, [0.0, 2.0])
    routed(torch.tensor([[5, 6, 7]]))
    assert routed.active_ratio_per_layer == {0: 1.0, 2: 0.0}
    assert routed.hard_thresholds == [0.0, 2.0]


def test_modes_switch_back_and_forth(routed: RoutedForCausalLM) -> None:
    input_ids = make_inputs(routed.base, 2, 9, 0).input_ids
    modes: list[float | list[float] | None] = [None, 0.5, 0.0, 2.0, [0.3, 0.6]]
    seen: list[torch.Tensor] = []
    for repeat in range(2):
        for index, mode in enumerate(modes):
            routed.set_router_mode(mode)
            logits = _logits(routed, input_ids)
            if repeat:
                assert torch.equal(logits, seen[index])
            seen.append(logits)
    assert not torch.equal(seen[1], seen[2])
    assert not torch.equal(seen[1], seen[3])


@pytest.mark.parametrize("threshold", [math.nan, math.inf, -0.5, [0.5], [0.5, 0.5, 0.5], [0.5, math.nan], []])
def test_refuses_thresholds_that_are_none_and_stays_as_it_is(
    routed: RoutedForCausalLM, threshold: float | Sequence[float]
) -> None:
    with pytest.raises(ConfigError):
        set_router_mode(routed, threshold)
    assert routed.hard_thresholds == [0.5, 0.5]


def test_usage_is_that_of_the_last_generation(routed: RoutedForCausalLM) -> None:
    prompt = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    routed(prompt)
    _generate(routed, prompt, mask, do_sample=False, eos_token_id=None)
    # The last token of each row is made, but not fed again.
    assert routed.usage.tokens == 6 + 2 * 5
    per_layer = routed.active_ratio_per_layer
    assert tuple(per_layer) == ROUTED_LAYERS
    assert routed.active_ratio == sum(per_layer.values()) / 2


@pytest.mark.parametrize("threshold", [None, 0.5])
def test_usage_adds_up_what_calls_return(routed: RoutedForCausalLM, threshold: float | None) -> None:
    routed.set_router_mode(threshold)
    active, tokens = torch.zeros(2), 0
    for seed in range(2):
        inputs = make_inputs(routed.base, 3, 5 + seed, 0, "left", seed)
        with torch.no_grad():
            gates = routed(*inputs.tokens).gates
        active += torch.stack([gate.squeeze(-1)[inputs.is_token].float().sum() for gate in gates])
        tokens += int(inputs.is_token.sum())
    assert list(routed.active_ratio_per_layer.values()) == pytest.approx((active / tokens).tolist())


@pytest.mark.parametrize("gate", ["soft", "straight_through"])
@pytest.mark.parametrize("make", [tiny_routed, tiny_grouped])
def test_gradients_reach_the_routers_only(gate: Any, make: Callable[..., RoutedForCausalLM]) -> None:
    model = make(gate, use_cache=False)
    model.set_router_mode(None)
    input_ids = make_inputs(model.base, 2, 9, 0).input_ids
    model(input_ids, labels=input_ids).loss.backward()
    routers = model.router_parameters()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in routers)
    trained = {id(parameter) for parameter in routers}
    assert all(parameter.grad is None for parameter in model.parameters() if id(parameter) not in trained)
    model.zero_grad()


def test_hard_builds_no_graph(routed: RoutedForCausalLM) -> None:
    input_ids = make_inputs(routed.base, 2, 9, 0).input_ids
    output = routed(input_ids, labels=input_ids)
    assert not output.logits.requires_grad
    assert not output.loss.requires_grad


def test_hard_leaves_the_routers_in_training() -> None:
    model = build_routed(tiny_base(), RouterConfig(router_hidden_size=8, router_dropout=0.5)).train()
    model.set_router_mode(0.5)
    model(torch.tensor([[5, 6, 7]]))
    assert all(router.training for router in model.routers.values())


def test_keeps_keys_and_values_unless_it_trains(routed: RoutedForCausalLM) -> None:
    input_ids = torch.tensor([[5, 6, 7]])
    assert routed(input_ids).past_key_values.get_seq_length() == 3
    assert routed(input_ids, use_cache=False).past_key_values is None
    assert routed(input_ids, labels=input_ids).past_key_values is None
    assert _hard(tiny_routed("straight_through", use_cache=False))(input_ids).past_key_values is None


@pytest.mark.parametrize("make", [tiny_routed, tiny_grouped])
def test_saves_base_and_routers(make: Callable[..., RoutedForCausalLM], tmp_path: Path) -> None:
    routed = _hard(make("straight_through"))
    input_ids = make_inputs(routed.base, 2, 9, 0).input_ids
    routed.save_pretrained(tmp_path / "saved")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(base.state_dict(), routed.base.state_dict(), rtol=0, atol=0)
    again = load_with_routers(tmp_path / "saved", hard_threshold=0.5)
    assert again.router_config == routed.router_config
    assert torch.equal(_logits(again, input_ids), _logits(routed, input_ids))


def _hard(model: RoutedForCausalLM) -> RoutedForCausalLM:
    model.set_router_mode(0.5)
    return model
