from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks.peers.gguf_file import write_gguf
from modcompile.checkpoint_sources import find_checkpoint
from modcompile.checkpoints import load_base, save_base
from modcompile.errors import UnsupportedModelError


def _llama(*, tied: bool = False, bias: bool = False) -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        rope_parameters={"rope_type": "default", "rope_theta": 1234.0},
        tie_word_embeddings=tied,
        attention_bias=bias,
    )
    model: PreTrainedModel = LlamaForCausalLM(config).eval()
    return model


@pytest.mark.parametrize("tied", [False, True])
def test_transformers_reads_the_same_model(tied: bool, tmp_path: Path) -> None:
    model = _llama(tied=tied)
    save_base(model, None, tmp_path)
    write_gguf(tmp_path, tmp_path / "model.gguf", GGMLQuantizationType.F32)
    read = load_base(find_checkpoint(str(tmp_path / "model.gguf")))
    ids = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(read(ids).logits, model(ids).logits)


def test_matrices_are_quantized_and_norms_are_not(tmp_path: Path) -> None:
    model = _llama()
    save_base(model, None, tmp_path)
    write_gguf(tmp_path, tmp_path / "model.gguf", GGMLQuantizationType.Q4_0)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert len(tensors) == len(model.state_dict())
    for name, tensor in tensors.items():
        expected = GGMLQuantizationType.F32 if "norm" in name else GGMLQuantizationType.Q4_0
        assert tensor.tensor_type == expected, name
    stored = tensors["blk.1.ffn_down.weight"]
    weight = model.state_dict()["model.layers.1.mlp.down_proj.weight"].numpy()
    read = gguf.quants.dequantize(stored.data, stored.tensor_type)
    # A step of 4 bits is an eighth of the largest of a block.
    assert 0 < np.abs(read - weight).max() <= np.abs(weight).max() / 8


def test_other_models_are_refused(tmp_path: Path) -> None:
    save_base(_llama(bias=True), None, tmp_path)
    with pytest.raises(UnsupportedModelError, match="no LLaMA without biases"):
        write_gguf(tmp_path, tmp_path / "model.gguf", GGMLQuantizationType.Q4_0)
    assert not (tmp_path / "model.gguf").exists()
