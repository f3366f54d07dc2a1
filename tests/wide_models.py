"""Random models whose heads have 16 features, as many as ONNX Runtime's attention asks for, and their graphs."""

from functools import cache
from typing import Any

import torch
from torch import fx
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from modcompile.passes import group_blocks, harden_gates, insert_depth_gates, lower_gates
from modcompile.routed_graph import trace_outlined
from modcompile.routers import SoftGate
from tests.model_inputs import Padding
from tests.tiny_graphs import random_routers
from tests.tiny_models import INITIALIZER_RANGE, SLIDING_WINDOW, VOCAB_SIZE

WIDE_ARCHITECTURES = ("llama", "qwen2", "qwen3", "mistral", "opt", "gpt2", "gemma3")
WITH_WINDOWS = ("mistral", "gemma3")
"""In a window transformers counts padding as well, which ONNX Runtime does not: where there is none, both agree."""
WITH_POSITIONS = ("opt", "gpt2")
"""Positions are embedded, not rotated."""

HIDDEN_SIZE, HEAD_SIZE, NUM_LAYERS, MAX_POSITIONS = 64, 16, 3, 64
GATED_LAYERS = (range(1), range(2, 3))

_SIZES: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_GROUPED: dict[str, Any] = _SIZES | {
    "hidden_size": HIDDEN_SIZE,
    "intermediate_size": 48,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_POSITIONS,
    "initializer_range": INITIALIZER_RANGE,
}


def wide_config(architecture: str) -> PretrainedConfig:
    """Of a few thousand parameters."""
    match architecture:
        case "llama":
            return LlamaConfig(**_GROUPED)
        case "qwen2":
            return Qwen2Config(**_GROUPED)
        case "qwen3":
            return Qwen3Config(**_GROUPED, head_dim=HEAD_SIZE)
        case "mistral":
            return MistralConfig(**_GROUPED, sliding_window=SLIDING_WINDOW)
        case "gemma3":
            kinds = ["sliding_attention", "full_attention", "sliding_attention"]
            shape: dict[str, Any] = {
                "head_dim": HEAD_SIZE,
                "query_pre_attn_scalar": 8,
                "sliding_window": SLIDING_WINDOW,
            }
            return Gemma3TextConfig(**_GROUPED | shape, layer_types=kinds)
        case "opt":
            shape = {"word_embed_proj_dim": HIDDEN_SIZE, "ffn_dim": 48, "init_std": INITIALIZER_RANGE}
            return OPTConfig(**_GROUPED | shape)
        case "gpt2":
            shape = {"n_embd": HIDDEN_SIZE, "n_layer": NUM_LAYERS, "n_head": 4, "n_positions": MAX_POSITIONS}
            return GPT2Config(**_SIZES, **shape, initializer_range=INITIALIZER_RANGE)
        case _:
            raise ValueError(f"no wide model of architecture {architecture!r}")


@cache
def wide_model(architecture: str) -> PreTrainedModel:
    """In evaluation mode, shared by all tests: not to be changed."""
    return model_of(wide_config(architecture))


def model_of(config: PretrainedConfig) -> PreTrainedModel:
    """Equal configurations give equal weights."""
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model.eval()


@cache
def wide_outlined(architecture: str) -> fx.GraphModule:
    """Its graph in outlined form."""
    return trace_outlined(wide_model(architecture))


def wide_lowered(
    architecture: str, gated_layers: tuple[range, ...] = GATED_LAYERS, *, gates_per_decision: int = 1
) -> fx.GraphModule:
    """The same with gates that skip some of the tokens, lowered: in a cond each."""
    routers = random_routers((layers.start for layers in gated_layers), hidden_size=HIDDEN_SIZE)
    grouped = group_blocks(wide_outlined(architecture), gated_layers)
    soft = insert_depth_gates(grouped, routers, SoftGate(), gates_per_decision=gates_per_decision)
    return lower_gates(harden_gates(soft))


def paddings(architecture: str, *kinds: Padding) -> tuple[Padding, ...]:
    """Those of the kinds with which a cached model of the architecture does what transformers does."""
    return ("none",) if architecture in WITH_WINDOWS else kinds
