"""Blocks that choose their precision, and whether they run at all."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from modcompile import LayerwiseQuantizeForCausalLM
from modcompile.config import RouterConfig
from modcompile.errors import ConfigError
from modcompile.precision_output import PrecisionCausalLMOutput
from tests.model_inputs import ModelInputs, make_inputs, run_model
from tests.routed_reference import choose, decide, run_reference
from tests.tiny_quantized import let_routers_decide, plain_model
from tests.tiny_routed import ROUTED_LAYERS, tiny_base

_DEPTH = RouterConfig(router_hidden_size=8, router_pattern="every_other")
_LAYERS = range(3)


@pytest.fixture(scope="module", params=["sequence", "token"])
def scope(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=["none", "low_rank"])
def layerwise(request: pytest.FixtureRequest, quantized_folder: Path, scope: str) -> LayerwiseQuantizeForCausalLM:
    """Its routers decide; their parameters are not to be changed."""
    depth = replace(_DEPTH, skip_adapter=request.param, adapter_rank=4)
    model = LayerwiseQuantizeForCausalLM.from_quantized(quantized_folder, depth=depth, router_scope=scope)
    assert tuple(model.adapters) == (() if request.param == "none" else ROUTED_LAYERS)
    let_routers_decide(model)
    return model


@pytest.fixture(scope="module")
def inputs() -> ModelInputs:
    return make_inputs(tiny_base(), 3, 8, 0, "left", 0)


def _used(model: LayerwiseQuantizeForCausalLM, inputs: ModelInputs) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits and, for each layer, bits, of tokens."""
    output = model.infer_forward(inputs.input_ids, inputs.attention_mask)
    assert output.logits is not None and output.num_bits is not None
    return output.logits[inputs.is_token], [bits[inputs.is_token] for bits in output.num_bits]


def test_untrained_gates_are_open(quantized_folder: Path, inputs: ModelInputs) -> None:
    untrained = LayerwiseQuantizeForCausalLM.from_quantized(quantized_folder, depth=_DEPTH)
    assert tuple(untrained.depth_routers) == ROUTED_LAYERS
    logits, bits = _used(untrained, inputs)
    torch.testing.assert_close(logits, run_model(tiny_base(), inputs)[0][inputs.is_token], rtol=0, atol=1e-4)
    assert all(bool((of_layer == 16).all()) for of_layer in bits)
    gates = untrained.train_forward(inputs.input_ids, inputs.attention_mask).gates
    assert gates is not None
    assert tuple(gates) == ROUTED_LAYERS
    assert all(bool((gate[inputs.is_token] == 1).all()) for gate in gates.values())


def test_closed_gates_skip_single_tokens(
    layerwise: LayerwiseQuantizeForCausalLM, quantized_folder: Path, inputs: ModelInputs
) -> None:
    """At the lowest precision, which is that of the keys and values of what is skipped."""
    layerwise.fix_precision(2)
    logits, bits = _used(layerwise, inputs)
    layerwise.fix_precision(None)
    thresholds = dict.fromkeys(ROUTED_LAYERS, 0.5)
    mixes, gates = decide(layerwise.depth_routers, thresholds, inputs, adapters=layerwise.adapters)
    expected = run_reference(plain_model(quantized_folder, [2, 2, 2]), inputs, mixes)
    torch.testing.assert_close(logits, expected[0][inputs.is_token], rtol=0, atol=1e-4)
    is_open = dict(zip(ROUTED_LAYERS, (gate[inputs.is_token].squeeze(-1) > 0.5 for gate in gates), strict=True))
    for layer in _LAYERS:
        run = is_open.get(layer, torch.ones_like(bits[layer], dtype=torch.bool))
        assert bits[layer].tolist() == (2 * run).tolist()
        assert layer not in is_open or 0 < run.sum() < len(run)


def test_threshold_0_runs_all_and_2_none(
    layerwise: LayerwiseQuantizeForCausalLM, quantized_folder: Path, inputs: ModelInputs
) -> None:
    plain = plain_model(quantized_folder, [16, 4, 16])
    layerwise.fix_precision([16, 4, 16])
    layerwise.set_hard_threshold(0)
    all_run, bits = _used(layerwise, inputs)
    torch.testing.assert_close(all_run, run_model(plain, inputs)[0][inputs.is_token], rtol=0, atol=1e-4)
    assert [of_layer.unique().tolist() for of_layer in bits] == [[16], [4], [16]]
    layerwise.set_hard_threshold(2)
    none_run, bits = _used(layerwise, inputs)
    never = torch.tensor(False)
    skipping = {layer: choose(never, layerwise.adapters.get(layer)) for layer in ROUTED_LAYERS}
    expected = run_reference(plain, inputs, skipping)[0]
    torch.testing.assert_close(none_run, expected[inputs.is_token], rtol=0, atol=1e-4)
    assert [of_layer.unique().tolist() for of_layer in bits] == [[0], [4], [0]]
    layerwise.set_hard_threshold(0.5)
    layerwise.fix_precision(None)


def test_refuses_thresholds_that_are_none(layerwise: LayerwiseQuantizeForCausalLM, inputs: ModelInputs) -> None:
    before = _used(layerwise, inputs)
    for threshold in (-0.1, math.nan, math.inf):
        with pytest.raises(ConfigError, match="--hard_threshold is"):
            layerwise.set_hard_threshold(threshold)
    torch.testing.assert_close(_used(layerwise, inputs), before, rtol=0, atol=0)


def test_without_gates_there_is_no_threshold(quantized_folder: Path) -> None:
    model = LayerwiseQuantizeForCausalLM.from_quantized(quantized_folder, [2])
    assert model.depth_routers == {}
    with pytest.raises(ConfigError, match="0 thresholds for 0 depth gates"):
        model.set_hard_threshold(0.5)


@pytest.mark.parametrize("router_stop", [4, 0])
def test_names_a_range_without_layers(quantized_folder: Path, router_stop: int) -> None:
    with pytest.raises(ConfigError, match=f"--router_stop {router_stop}"):
        LayerwiseQuantizeForCausalLM.from_quantized(quantized_folder, depth=RouterConfig(router_stop=router_stop))


def test_training_while_hard_is_what_a_row_alone_gets(
    layerwise: LayerwiseQuantizeForCausalLM, inputs: ModelInputs
) -> None:
    with torch.no_grad():
        trained = layerwise.train_forward(inputs.input_ids, inputs.attention_mask, hard=True)
    assert trained.logits is not None and trained.gates is not None
    for row in range(3):
        is_token = inputs.is_token[row]
        used = layerwise.infer_forward(inputs.input_ids[row][is_token].unsqueeze(0))
        assert used.logits is not None and used.num_bits is not None
        torch.testing.assert_close(trained.logits[row][is_token], used.logits[0], rtol=0, atol=1e-4)
        for layer in _LAYERS:
            bits = _bits_of(trained, layer, layerwise.precisions, row)[is_token]
            assert bits.tolist() == used.num_bits[layer][0].tolist()


def test_while_hard_soft_gates_are_open_or_closed(quantized_folder: Path, inputs: ModelInputs) -> None:
    soft = RouterConfig(router_hidden_size=8, gate="soft")
    model = LayerwiseQuantizeForCausalLM.from_quantized(quantized_folder, depth=soft)
    let_routers_decide(model)
    with torch.no_grad():
        soft_gates = model.train_forward(inputs.input_ids, inputs.attention_mask).gates
        hard_gates = model.train_forward(inputs.input_ids, inputs.attention_mask, hard=True).gates
    assert soft_gates is not None and hard_gates is not None
    first, first_hard = soft_gates[0][inputs.is_token], hard_gates[0][inputs.is_token]
    assert bool(((first > 0) & (first < 1)).all())
    assert torch.equal(first_hard, (first > 0.5).float())
    assert set(first_hard.flatten().tolist()) == {0.0, 1.0}


def _bits_of(output: PrecisionCausalLMOutput, layer: int, precisions: list[int], row: int) -> torch.Tensor:
    assert output.precision_weights is not None and output.gates is not None and output.tokens is not None
    # Of sequences a row for all of its tokens, of tokens one each.
    bits = (output.precision_weights[layer][row] @ torch.tensor(precisions).float()).expand(output.tokens.shape[1])
    return bits * output.gates[layer][row, :, 0] if layer in output.gates else bits
