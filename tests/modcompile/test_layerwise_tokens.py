"""Blocks whose precision each token chooses for itself."""

from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from modcompile import LayerwiseQuantizeForCausalLM
from modcompile.precision_output import PrecisionCausalLMOutput
from tests.model_inputs import ModelInputs, make_inputs
from tests.tiny_quantized import BITS, NUM_LAYERS, let_routers_decide, plain_model
from tests.tiny_routed import tiny_base


@pytest.fixture(scope="module")
def layerwise(quantized_folder: Path) -> LayerwiseQuantizeForCausalLM:
    """Its routers decide; not to be changed."""
    model = LayerwiseQuantizeForCausalLM.from_quantized(quantized_folder, router_scope="token")
    let_routers_decide(model)
    return model


@pytest.fixture(scope="module", params=["left", "right"])
def inputs(request: pytest.FixtureRequest) -> ModelInputs:
    return make_inputs(tiny_base(), 3, 8, 0, request.param, 0)


def _bits(output: PrecisionCausalLMOutput) -> torch.Tensor:
    """`[L, B, T]`."""
    assert output.num_bits is not None
    return torch.stack(output.num_bits)


def test_each_token_has_its_own_bits(layerwise: LayerwiseQuantizeForCausalLM, inputs: ModelInputs) -> None:
    output = layerwise.infer_forward(inputs.input_ids, inputs.attention_mask)
    bits = _bits(output)
    assert bits.shape == (NUM_LAYERS, 3, 8)
    assert set(bits[:, inputs.is_token].flatten().tolist()) == set(BITS)
    assert (bits[0, 0][inputs.is_token[0]].unique()).numel() > 1
    assert output.tokens is not None
    assert torch.equal(output.tokens, inputs.is_token)


def test_what_a_token_gets_does_not_depend_on_the_batch(
    layerwise: LayerwiseQuantizeForCausalLM, inputs: ModelInputs
) -> None:
    batch = layerwise.infer_forward(inputs.input_ids, inputs.attention_mask)
    assert batch.logits is not None
    for row in range(3):
        alone = layerwise.infer_forward(inputs.input_ids[row][inputs.is_token[row]].unsqueeze(0))
        assert alone.logits is not None
        torch.testing.assert_close(batch.logits[row][inputs.is_token[row]], alone.logits[0], rtol=0, atol=1e-4)
        assert torch.equal(_bits(batch)[:, row, inputs.is_token[row]], _bits(alone)[:, 0])


def test_training_while_hard_is_what_is_used(layerwise: LayerwiseQuantizeForCausalLM, inputs: ModelInputs) -> None:
    with torch.no_grad():
        trained = layerwise.train_forward(inputs.input_ids, inputs.attention_mask, hard=True)
    used = layerwise.infer_forward(inputs.input_ids, inputs.attention_mask)
    assert trained.logits is not None and trained.precision_weights is not None and used.logits is not None
    torch.testing.assert_close(trained.logits[inputs.is_token], used.logits[inputs.is_token], rtol=0, atol=1e-4)
    for weights, bits in zip(trained.precision_weights, _bits(used), strict=True):
        assert weights.shape == (3, 8, len(BITS))
        chosen = (weights @ torch.tensor(BITS).float()).long()
        assert torch.equal(chosen[inputs.is_token], bits[inputs.is_token])
        assert torch.equal(weights.sum(-1), weights.max(-1).values)


def test_generates_with_a_cache_what_it_computes_without(layerwise: LayerwiseQuantizeForCausalLM) -> None:
    ids = torch.randint(3, 300, (1, 5), generator=torch.Generator().manual_seed(0))
    options = {"max_length": 14, "do_sample": False, "eos_token_id": None}
    generated = layerwise.generate(ids, **options)
    assert generated.shape == (1, 14)
    assert torch.equal(layerwise.generate(ids, **options, use_cache=False), generated)
    whole = layerwise.infer_forward(generated)
    assert whole.logits is not None
    cache, seen = None, 0
    for stop in (5, 6, 9, 14):
        step = layerwise.infer_forward(generated[:, seen:stop], torch.ones(1, stop), past_key_values=cache)
        assert isinstance(step.past_key_values, DynamicCache)
        assert step.logits is not None
        torch.testing.assert_close(step.logits, whole.logits[:, seen:stop], rtol=0, atol=1e-4)
        assert torch.equal(_bits(step), _bits(whole)[:, :, seen:stop])
        cache, seen = step.past_key_values, stop


@pytest.mark.parametrize("bits", [[2, 2, 2], [16, 2, 4]])
def test_fixed_it_is_the_model_at_these_bits(
    layerwise: LayerwiseQuantizeForCausalLM, quantized_folder: Path, inputs: ModelInputs, bits: list[int]
) -> None:
    layerwise.fix_precision(bits)
    output = layerwise.infer_forward(inputs.input_ids, inputs.attention_mask)
    layerwise.fix_precision(None)
    with torch.no_grad():
        expected = plain_model(quantized_folder, bits)(
            input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, position_ids=inputs.position_ids
        ).logits
    assert output.logits is not None
    torch.testing.assert_close(output.logits[inputs.is_token], expected[inputs.is_token], rtol=0, atol=1e-4)
    assert [set(of_layer.tolist()) for of_layer in _bits(output)[:, inputs.is_token]] == [{each} for each in bits]
