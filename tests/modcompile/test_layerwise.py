from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from modcompile import LayerwiseQuantizeForCausalLM
from modcompile.errors import ArtifactError, ConfigError
from modcompile.precision_config import QuantizationConfig
from modcompile.precision_output import PrecisionCausalLMOutput
from modcompile.quantized_folder import read_quantized_folder, write_quantized_folder
from modcompile.quantizing import quantize_base
from tests.model_inputs import ModelInputs, make_inputs
from tests.tiny_models import VOCAB_SIZE
from tests.tiny_quantized import let_routers_decide

NUM_LAYERS = 3
BITS = [4, 8, 16]


@pytest.fixture(scope="module")
def folder(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("quantized") / "folder"
    write_quantized_folder(quantize_base(model, QuantizationConfig(group_size=32, method="rtn")), None, path)
    return path


def _load(folder: Path, precisions: list[int] | None = None) -> LayerwiseQuantizeForCausalLM:
    """With routers that decide by the tokens."""
    layerwise = LayerwiseQuantizeForCausalLM.from_quantized(quant_model_path=folder, precisions=precisions)
    let_routers_decide(layerwise)
    return layerwise


@pytest.fixture(scope="module")
def layerwise(folder: Path) -> LayerwiseQuantizeForCausalLM:
    """For all tests that change no parameter of it."""
    return _load(folder)


@pytest.fixture
def inputs(model: PreTrainedModel) -> ModelInputs:
    return make_inputs(model, 3, 6, 0, "left", 0)


def _expected(folder: Path, bits: list[int], inputs: ModelInputs) -> torch.Tensor:
    """Logits of plain transformers on weights that are dequantized here, each block at bits of its own."""
    read = read_quantized_folder(folder)
    layers = next(child for child in read.base.modules() if isinstance(child, nn.ModuleList))
    with torch.no_grad():
        for index, layer in enumerate(layers):
            mine = {id(parameter) for parameter in layer.parameters()}
            for name, weight in read.weights.items():
                parameter = read.base.get_parameter(name)
                if id(parameter) in mine and bits[index] != 16:
                    dense = weight.dequantize(bits[index])
                    parameter.copy_(dense.T if name in read.transposed else dense)
        output = read.base(
            input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, position_ids=inputs.position_ids
        )
    logits: torch.Tensor = output.logits
    return logits[inputs.is_token]


def _at_tokens(output: PrecisionCausalLMOutput, inputs: ModelInputs) -> torch.Tensor:
    assert output.logits is not None
    return output.logits[inputs.is_token]


def test_untrained_it_has_the_most_bits_and_is_the_model(
    folder: Path, model: PreTrainedModel, inputs: ModelInputs
) -> None:
    output = LayerwiseQuantizeForCausalLM.from_quantized(folder)(inputs.input_ids, inputs.attention_mask)
    expected = model(
        input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, position_ids=inputs.position_ids
    ).logits
    assert torch.equal(_at_tokens(output, inputs), expected[inputs.is_token])
    assert all(bool((bits == 16).all()) for bits in output.num_bits)
    assert [tuple(bits.shape) for bits in output.num_bits] == [(3, 6)] * NUM_LAYERS


@pytest.mark.parametrize("bits", [[4, 4, 4], [8, 8, 8], [16, 4, 8]])
def test_computes_with_the_bits_that_are_fixed(
    layerwise: LayerwiseQuantizeForCausalLM, folder: Path, inputs: ModelInputs, bits: list[int]
) -> None:
    layerwise.fix_precision(bits if len(set(bits)) > 1 else bits[0])
    output = layerwise.infer_forward(inputs.input_ids, inputs.attention_mask)
    layerwise.fix_precision(None)
    expected = _expected(folder, bits, inputs)
    torch.testing.assert_close(_at_tokens(output, inputs), expected, rtol=0, atol=1e-5)
    assert output.num_bits is not None
    assert [int(chosen.unique()) for chosen in output.num_bits] == bits


def test_routers_decide(layerwise: LayerwiseQuantizeForCausalLM, folder: Path, model: PreTrainedModel) -> None:
    seen = set()
    for seed in range(8):
        inputs = make_inputs(model, 1, 5, 0, "none", seed)
        output = layerwise(inputs.input_ids)
        assert output.num_bits is not None
        bits = [int(chosen.unique()) for chosen in output.num_bits]
        seen |= set(enumerate(bits))
        expected = _expected(folder, bits, inputs)
        torch.testing.assert_close(_at_tokens(output, inputs), expected, rtol=0, atol=1e-5)
    assert len(seen) > NUM_LAYERS


def test_a_batch_has_the_most_bits_that_a_row_chose(
    layerwise: LayerwiseQuantizeForCausalLM, model: PreTrainedModel
) -> None:
    differ = 0
    for seed in range(16):
        inputs = make_inputs(model, 2, 5, 0, "none", seed)
        # Of the first block alone: what the others read depends on what it chose.
        rows = [int(layerwise(inputs.input_ids[row : row + 1]).num_bits[0].unique()) for row in range(2)]
        assert int(layerwise(inputs.input_ids).num_bits[0].unique()) == max(rows)
        differ += rows[0] != rows[1]
    assert differ


def test_training_mixes_all_precisions_and_reaches_the_routers_alone(folder: Path, inputs: ModelInputs) -> None:
    layerwise = _load(folder)
    before = {name: tensor.clone() for name, tensor in layerwise.base.state_dict().items()}
    output = layerwise.train_forward(inputs.input_ids, inputs.attention_mask, labels=inputs.input_ids)
    assert output.loss is not None
    assert output.precision_weights is not None
    for weights in output.precision_weights:
        assert weights.shape == (3, 1, 3)
        torch.testing.assert_close(weights.sum(-1), torch.ones(3, 1))
    output.loss.backward()
    trainable = layerwise.get_trainable_parameters()
    assert {id(parameter) for parameter in trainable} == {
        id(p) for router in layerwise.routers.values() for p in router.parameters()
    }
    assert all(parameter.grad is not None for parameter in trainable)
    assert all(parameter.grad is None for parameter in layerwise.get_frozen_parameters())
    torch.optim.SGD(trainable, lr=1.0).step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in layerwise.base.state_dict().items())


def test_training_on_one_precision_is_inference_at_it(folder: Path, inputs: ModelInputs) -> None:
    layerwise = LayerwiseQuantizeForCausalLM.from_quantized(folder, precisions=[8])
    trained = layerwise.train_forward(inputs.input_ids, inputs.attention_mask)
    used = layerwise.infer_forward(inputs.input_ids, inputs.attention_mask)
    torch.testing.assert_close(_at_tokens(trained, inputs), _at_tokens(used, inputs), rtol=0, atol=1e-5)
    assert used.num_bits is not None
    assert int(used.num_bits[0].unique()) == 8


def test_mode_decides_what_forward_is(folder: Path, inputs: ModelInputs) -> None:
    layerwise = _load(folder)
    assert layerwise(inputs.input_ids).num_bits is not None
    assert layerwise.train()(inputs.input_ids).precision_weights is not None


def test_generates_step_by_step_what_it_computes_step_by_step(
    layerwise: LayerwiseQuantizeForCausalLM, model: PreTrainedModel
) -> None:
    prompt = make_inputs(model, 1, 5, 0, "none", 3).input_ids
    generated = layerwise.generate(prompt, max_length=12, do_sample=False)
    ids, cache = prompt, None
    for position in range(5, generated.shape[1]):
        output = layerwise.infer_forward(ids, past_key_values=cache)
        assert output.logits is not None
        assert isinstance(output.past_key_values, DynamicCache)
        cache, ids = output.past_key_values, output.logits[:, -1:].argmax(-1)
        assert int(ids) == int(generated[0, position])
    torch.manual_seed(0)
    sampled = layerwise.generate(prompt, max_length=10, do_sample=True, temperature=0.7)
    assert sampled.shape[0] == 1
    assert int(sampled.max()) < VOCAB_SIZE


def test_generates_amid_a_training_what_it_generates_after(folder: Path, model: PreTrainedModel) -> None:
    layerwise = LayerwiseQuantizeForCausalLM.from_quantized(folder, router_dropout=0.5)
    let_routers_decide(layerwise)
    prompt = make_inputs(model, 2, 5, 0, "none", 3).input_ids
    expected = layerwise.generate(prompt, max_length=12, do_sample=False)
    layerwise.train()
    assert torch.equal(layerwise.generate(prompt, max_length=12, do_sample=False), expected)
    assert layerwise.training and all(router.training for router in layerwise.routers.values())


def test_unfreezing_warns_and_works(folder: Path) -> None:
    layerwise = _load(folder)
    with pytest.warns(UserWarning, match="the base's parameters are unfrozen"):
        layerwise.unfreeze_original_parameters()
    assert layerwise.get_frozen_parameters() == []


def test_names_what_is_wrong(folder: Path, layerwise: LayerwiseQuantizeForCausalLM, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no weights of 3 bits; it has 4, 8, 16"):
        LayerwiseQuantizeForCausalLM.from_quantized(folder, precisions=[3])
    with pytest.raises(ConfigError, match="never run"):
        LayerwiseQuantizeForCausalLM.from_quantized(folder, trust_remote_code=True)
    with pytest.raises(ArtifactError, match="is not a folder"):
        LayerwiseQuantizeForCausalLM.from_quantized(tmp_path / "nowhere")
    for bits in (2, [4, 8]):
        with pytest.raises(ConfigError, match="is not one of 4, 8, 16 for each of the 3 blocks"):
            layerwise.fix_precision(bits)
