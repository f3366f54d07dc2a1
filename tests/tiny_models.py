"""Random models of a few thousand parameters, one for each architecture that the tests cover."""

from typing import Any

import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

ARCHITECTURES = ("llama", "mistral", "opt", "gpt2", "qwen2")

VOCAB_SIZE = 96
HIDDEN_SIZE = 32
SLIDING_WINDOW = 6
INITIALIZER_RANGE = 0.2  # ten times the usual: each block then changes the logits by far more than a tolerance


def tiny_model(architecture: str, num_layers: int = 3, seed: int = 0) -> PreTrainedModel:
    """A model in evaluation mode; equal arguments give equal weights."""
    torch.manual_seed(seed)
    grouped: dict[str, Any] = {
        "hidden_size": HIDDEN_SIZE,
        "intermediate_size": 48,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": 128,
        "initializer_range": INITIALIZER_RANGE,
    }
    match architecture:
        case "llama":
            model: PreTrainedModel = LlamaForCausalLM(LlamaConfig(**grouped))
        case "mistral":
            model = MistralForCausalLM(MistralConfig(**grouped, sliding_window=SLIDING_WINDOW))
        case "qwen2":
            model = Qwen2ForCausalLM(Qwen2Config(**grouped))
        case "opt":
            model = OPTForCausalLM(
                OPTConfig(
                    hidden_size=HIDDEN_SIZE,
                    word_embed_proj_dim=HIDDEN_SIZE,
                    ffn_dim=48,
                    num_hidden_layers=num_layers,
                    num_attention_heads=4,
                    vocab_size=VOCAB_SIZE,
                    max_position_embeddings=128,
                    init_std=INITIALIZER_RANGE,
                )
            )
        case "gpt2":
            model = GPT2LMHeadModel(
                GPT2Config(
                    n_embd=HIDDEN_SIZE,
                    n_layer=num_layers,
                    n_head=4,
                    vocab_size=VOCAB_SIZE,
                    n_positions=128,
                    initializer_range=INITIALIZER_RANGE,
                    bos_token_id=1,
                    eos_token_id=2,
                )
            )
        case _:
            raise ValueError(f"no tiny model of architecture {architecture!r}")
    return model.eval()


class RotatedLinear(nn.Module):
    """A linear layer whose inputs are first multiplied by a matrix that is no parameter: the identity."""

    rotation: torch.Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.register_buffer("rotation", torch.eye(linear.in_features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., in]` → `[..., out]`."""
        y: torch.Tensor = self.linear(x @ self.rotation)
        return y


def rotated_model() -> PreTrainedModel:
    """The tiny LLaMA, whose blocks multiply by a fixed buffer as well, which changes nothing."""
    model = tiny_model("llama")
    for module in [module for name, module in model.named_modules() if name.endswith(".mlp")]:
        down = module.get_submodule("down_proj")
        assert isinstance(down, nn.Linear)
        module.register_module("down_proj", RotatedLinear(down))
    return model
