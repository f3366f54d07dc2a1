"""A GGUF file of a random LLaMA of a few thousand parameters."""

from pathlib import Path

import gguf
import numpy as np

VOCAB_SIZE = 64
_HIDDEN_SIZE, _INTERMEDIATE_SIZE, _NUM_LAYERS, _NUM_HEADS, _NUM_KV_HEADS = 32, 64, 2, 2, 1


def write_tiny_gguf(path: Path, *, tokenizer: bool = True) -> None:
    """float32 weights, an untied head, and by default a byte-pair tokenizer of the printable ASCII characters."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(_HIDDEN_SIZE)
    writer.add_block_count(_NUM_LAYERS)
    writer.add_feed_forward_length(_INTERMEDIATE_SIZE)
    writer.add_head_count(_NUM_HEADS)
    writer.add_head_count_kv(_NUM_KV_HEADS)
    writer.add_rope_dimension_count(_HIDDEN_SIZE // _NUM_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCAB_SIZE)
    if tokenizer:
        tokens = ["<s>", "</s>", *map(chr, range(65, 125))]
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list([*tokens, "ab", "cd"])
        writer.add_token_merges(["a b", "c d"])
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(1)
    for name, tensor in _tensors().items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)

    def matrix(rows: int, columns: int) -> np.ndarray:
        return (random.standard_normal((rows, columns)) * 0.1).astype(np.float32)

    norm = np.ones(_HIDDEN_SIZE, np.float32)
    kv_size = _HIDDEN_SIZE // _NUM_HEADS * _NUM_KV_HEADS
    tensors = {"token_embd.weight": matrix(VOCAB_SIZE, _HIDDEN_SIZE)}
    for layer in range(_NUM_LAYERS):
        tensors |= {
            f"blk.{layer}.attn_norm.weight": norm,
            f"blk.{layer}.attn_q.weight": matrix(_HIDDEN_SIZE, _HIDDEN_SIZE),
            f"blk.{layer}.attn_k.weight": matrix(kv_size, _HIDDEN_SIZE),
            f"blk.{layer}.attn_v.weight": matrix(kv_size, _HIDDEN_SIZE),
            f"blk.{layer}.attn_output.weight": matrix(_HIDDEN_SIZE, _HIDDEN_SIZE),
            f"blk.{layer}.ffn_norm.weight": norm,
            f"blk.{layer}.ffn_gate.weight": matrix(_INTERMEDIATE_SIZE, _HIDDEN_SIZE),
            f"blk.{layer}.ffn_up.weight": matrix(_INTERMEDIATE_SIZE, _HIDDEN_SIZE),
            f"blk.{layer}.ffn_down.weight": matrix(_HIDDEN_SIZE, _INTERMEDIATE_SIZE),
        }
    return tensors | {"output_norm.weight": norm, "output.weight": matrix(VOCAB_SIZE, _HIDDEN_SIZE)}
