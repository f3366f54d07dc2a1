from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertLMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    RobertaConfig,
    RobertaForCausalLM,
    ViTConfig,
    ViTModel,
)

from modcompile.causality import check_is_causal
from modcompile.errors import UnsupportedModelError
from tests.tiny_models import tiny_model

_SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def test_lets_decoders_pass(model: PreTrainedModel) -> None:
    check_is_causal(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lets_a_mixture_of_experts_pass(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    config = MixtralConfig(**_SIZES, num_key_value_heads=2, num_local_experts=4)
    experts = MixtralForCausalLM(config).eval()
    torch.nn.Module.to(experts, dtype)
    check_is_causal(experts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_refuses_encoders(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for encoder in (BertLMHeadModel(BertConfig(**_SIZES)), RobertaForCausalLM(RobertaConfig(**_SIZES))):
        torch.nn.Module.to(encoder.eval(), dtype)
        with pytest.raises(UnsupportedModelError, match=f"{type(encoder).__name__} is an encoder"):
            check_is_causal(encoder)


def test_lets_the_same_model_pass_as_a_decoder() -> None:
    check_is_causal(BertLMHeadModel(BertConfig(**_SIZES, is_decoder=True)).eval())


def test_refuses_what_takes_no_tokens() -> None:
    model = ViTModel(ViTConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4))
    with pytest.raises(UnsupportedModelError, match="ViTModel does not run as a language model on plain tokens"):
        check_is_causal(model.eval())


def test_refuses_what_computes_no_numbers() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight.fill_(1e38)  # finite, and too large to multiply
    with pytest.raises(UnsupportedModelError, match="computes NaN or infinite logits"):
        check_is_causal(model)


def test_leaves_the_model_as_it_was() -> None:
    model = tiny_model("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    check_is_causal(model)
    assert not model.get_input_embeddings()._forward_hooks
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
