from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from modcompile.precision_config import QuantizationConfig
from modcompile.quantizing import find_block_linears, quantize_base, relative_errors
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


@pytest.mark.parametrize("sharing", ["nested", "separate"])
def test_every_weight_comes_back_nearly(model: PreTrainedModel, sharing: Any) -> None:
    config = QuantizationConfig(precisions=[4, 8, 16], group_size=32, weight_sharing=sharing)
    checkpoint = quantize_base(model, config)
    parameters = dict(model.named_parameters())
    for name, weight in checkpoint.weights.items():
        original = parameters[name].detach()
        original = original.T if name in checkpoint.transposed else original
        assert weight.in_features == original.shape[1]
        assert float((weight.dequantize(8) - original).norm() / original.norm()) < 0.02
    errors = relative_errors(checkpoint)
    assert errors[16] == 0
    assert 0 < errors[8] < 0.02 < errors[4] < 0.2


def test_the_base_is_left_alone() -> None:
    base = tiny_base()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    quantize_base(base, QuantizationConfig())
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())
