"""A tiny LLaMA in the format of any-precision-llm, packed byte by byte, with random codes and tables."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from tests.tiny_models import INITIALIZER_RANGE, VOCAB_SIZE

SEED, PARENT = 3, 8
NUM_LAYERS = 2
MODULES = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


@dataclass(frozen=True)
class TinyAnyPrecision:
    """What a folder holds, and what it stands for."""

    model: PreTrainedModel
    """In float16, with the original weights; its config has the entry."""
    state: dict[str, torch.Tensor]
    """The tensors of the folder."""
    dense: dict[str, dict[int, torch.Tensor]]
    """By the parameter's name, then by precision: float32 `[N, K]`."""


def pack_planes(codes: np.ndarray, num_bits: int) -> torch.Tensor:
    """uint8 codes `[N, K]` → int32 `[num_bits, N, K / 32]`."""
    rows, in_features = codes.shape
    num_bytes = in_features // 8
    packed = np.zeros((num_bits, rows, num_bytes), np.uint8)
    for index in range(num_bits):
        bits = codes >> (num_bits - 1 - index) & 1
        in_order = np.packbits(bits, axis=1)
        for start in range(0, num_bytes, 128):
            words = min(128, num_bytes - start) // 4
            for byte in range(4 * words):
                word, place = byte % words, byte // words
                packed[index, :, start + 4 * word + 3 - place] = in_order[:, start + byte]
    return torch.from_numpy(packed.view(np.int32))


def tiny_any_precision() -> TinyAnyPrecision:
    """Rows of 2 words (the attention's) and of 33: a run and a word left."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=1056,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=128,
        initializer_range=INITIALIZER_RANGE,
    )
    model = LlamaForCausalLM(config).half().eval()
    model.config.anyprec = {
        "seed_precision": SEED,
        "parent_precision": PARENT,
        "group_count": 1,
        "arch_config": {"module_names": list(MODULES), "model_name": "model", "layers_name": "layers"},
    }
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rng = np.random.default_rng(0)
    dense: dict[str, dict[int, torch.Tensor]] = {}
    for layer in range(NUM_LAYERS):
        for module in (f"model.layers.{layer}.{name}" for name in MODULES):
            rows, in_features = state.pop(f"{module}.weight").shape
            codes = rng.integers(0, 2**PARENT, (rows, in_features), np.uint8)
            state[f"{module}.qweight"] = pack_planes(codes, PARENT)
            dense[f"{module}.weight"] = {}
            for bits in range(SEED, PARENT + 1):
                table = rng.normal(scale=in_features**-0.5, size=(rows, 2**bits)).astype(np.float16)
                state[f"{module}.lut{bits}"] = torch.from_numpy(table)
                values = np.take_along_axis(table, (codes >> (PARENT - bits)).astype(np.int64), 1)
                dense[f"{module}.weight"][bits] = torch.from_numpy(values.astype(np.float32))
    return TinyAnyPrecision(model, state, dense)


def write_any_precision(tiny: TinyAnyPrecision, folder: Path) -> None:
    """As its packer does: a pickle of the tensors, and the config."""
    folder.mkdir()
    torch.save(tiny.state, folder / "pytorch_model.bin")
    tiny.model.config.save_pretrained(folder)
