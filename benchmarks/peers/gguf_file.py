"""A LLaMA as a GGUF file with 4-bit weights: llama-cpp-python brings nothing that converts one."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType
from safetensors import safe_open
from transformers import AutoConfig, LlamaConfig

from modcompile.errors import UnsupportedModelError


def write_gguf(folder: Path, path: Path, kind: GGMLQuantizationType) -> None:
    """Write the model of `folder` (config.json, model.safetensors): all matrices as `kind`, norms in float32.

    Embeddings and head are of that kind, too, as in other 4-bit models here; llama.cpp's own tool gives the head more
    bits, which makes it slower. There is no tokenizer in the file.

    Raises:
        UnsupportedModelError: it is no LLaMA without biases.
    """
    config = AutoConfig.from_pretrained(folder)
    if not isinstance(config, LlamaConfig) or config.attention_bias or config.mlp_bias:
        raise UnsupportedModelError(f"{folder} holds no LLaMA without biases, and no other is written as GGUF")
    writer = gguf.GGUFWriter(path, "llama")
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads or config.num_attention_heads}
    _add_config(writer, config, heads["k_proj"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    with safe_open(folder / "model.safetensors", "pt") as tensors:
        for name in sorted(tensors.keys()):
            weight = tensors.get_tensor(name).float()
            projection = name.split(".")[-2]
            if projection in heads:
                weight = _interleaved(weight, heads[projection])
            target = names.get_name(name, try_suffixes=(".weight",))
            assert target is not None
            stored = kind if weight.dim() > 1 else GGMLQuantizationType.F32
            array: np.ndarray = weight.contiguous().numpy()
            writer.add_tensor(target, gguf.quants.quantize(array, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_config(writer: gguf.GGUFWriter, config: LlamaConfig, kv_heads: int) -> None:
    rotary: Any = config.rope_parameters
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(config.head_dim or config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(rotary["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")


def _interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp rotates neighbours `[out, in]` within a head, transformers the halves of a head."""
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)
