from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedModel

from modcompile.errors import ConfigError
from modcompile.precision_config import QuantizationConfig
from modcompile.quantizing import find_block_linears, quantize_base, relative_errors
from tests.tiny_models import rotated_model
from tests.tiny_routed import tiny_base


def test_finds_what_blocks_multiply_by(model: PreTrainedModel, architecture: str) -> None:
    found = find_block_linears(model)
    names = {name for name, _ in model.named_parameters()}
    assert found.keys() <= names
    assert all(tensor.dim() == 2 for name, tensor in model.named_parameters() if name in found)
    assert not any(part in name for name in found for part in ("embed", "wte", "wpe", "lm_head", "norm", "ln_"))
    inside = [name for name, tensor in model.named_parameters() if tensor.dim() == 2 and ".0." in name]
    assert sorted(name for name in found if ".0." in name) == sorted(inside)
    assert set(found.values()) == {architecture == "gpt2"}


def test_products_with_a_fixed_buffer_are_left_alone(llama: PreTrainedModel) -> None:
    found = find_block_linears(rotated_model())
    assert found.keys() == {name.replace(".down_proj.", ".down_proj.linear.") for name in find_block_linears(llama)}
    assert not any(found.values())


@pytest.mark.parametrize(("method", "sharing"), [("rtn", "nested"), ("rtn", "separate"), ("gptq", "nested")])
def test_every_weight_comes_back_nearly(
    model: PreTrainedModel, random_text: Dataset, method: Any, sharing: Any
) -> None:
    config = QuantizationConfig(precisions=[4, 8, 16], group_size=32, weight_sharing=sharing, method=method)
    checkpoint = quantize_base(model, config, random_text)
    assert checkpoint.weights.keys() == find_block_linears(model).keys()
    # What rounding for a text changes least is not the weights.
    most = {4: 0.2, 8: 0.02} if method == "rtn" else {4: 0.3, 8: 0.05}
    parameters = dict(model.named_parameters())
    for name, weight in checkpoint.weights.items():
        original = parameters[name].detach()
        original = original.T if name in checkpoint.transposed else original
        assert weight.in_features == original.shape[1]
        assert float((weight.dequantize(8) - original).norm() / original.norm()) < most[8]
    errors = relative_errors(checkpoint)
    assert errors[16] == 0
    assert 0 < errors[8] < most[8] < errors[4] < most[4]


def test_gptq_needs_a_text(llama: PreTrainedModel) -> None:
    with pytest.raises(ConfigError, match="--method gptq rounds for a text and got none"):
        quantize_base(llama, QuantizationConfig())
    assert (
        not quantize_base(llama, QuantizationConfig(precisions=[16])).weights["model.layers.0.mlp.up_proj.weight"].parts
    )


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_the_base_is_left_alone(random_text: Dataset, method: Any) -> None:
    base = tiny_base()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    quantize_base(base, QuantizationConfig(method=method), random_text)
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())
