import json
from pathlib import Path
from typing import Any

import pytest
from transformers import BartConfig, PretrainedConfig, T5Config, ViTConfig

from modcompile.checkpoint_config import load_config, summary
from modcompile.checkpoint_sources import CheckpointSource, find_checkpoint
from modcompile.errors import CheckpointError, UnsupportedModelError
from tests.tiny_gguf import VOCAB_SIZE, write_tiny_gguf

_LLAMA: dict[str, Any] = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def _source(folder: Path, config: dict[str, Any] | PretrainedConfig) -> CheckpointSource:
    if isinstance(config, PretrainedConfig):
        config.save_pretrained(folder)
    else:
        (folder / "config.json").write_text(json.dumps(config))
    return find_checkpoint(str(folder))


def test_loads_a_config(tmp_path: Path) -> None:
    config = load_config(_source(tmp_path, _LLAMA), tmp_path)
    assert (config.model_type, config.hidden_size, config.num_hidden_layers) == ("llama", 32, 2)


def test_loads_the_config_of_a_gguf_file(tmp_path: Path) -> None:
    write_tiny_gguf(tmp_path / "tiny.gguf")
    config = load_config(find_checkpoint(str(tmp_path / "tiny.gguf")), tmp_path)
    assert (config.model_type, config.vocab_size, config.num_hidden_layers) == ("llama", VOCAB_SIZE, 2)


@pytest.mark.parametrize("config", [T5Config(), BartConfig()], ids=["t5", "bart"])
def test_refuses_an_encoder_decoder(tmp_path: Path, config: PretrainedConfig) -> None:
    source = _source(tmp_path, config)
    with pytest.raises(UnsupportedModelError, match=rf"is an encoder-decoder \({config.model_type}\)"):
        load_config(source, tmp_path)


def test_refuses_what_has_no_causal_language_model(tmp_path: Path) -> None:
    source = _source(tmp_path, ViTConfig())
    with pytest.raises(UnsupportedModelError, match=r"is no causal language model \(vit has none in transformers\)"):
        load_config(source, tmp_path)


def test_refuses_quantized_weights(tmp_path: Path) -> None:
    source = _source(tmp_path, {**_LLAMA, "quantization_config": {"quant_method": "gptq", "bits": 4}})
    with pytest.raises(UnsupportedModelError, match=r"is quantized .*; give the checkpoint that it was made from"):
        load_config(source, tmp_path)


def test_names_a_model_type_that_transformers_does_not_know(tmp_path: Path) -> None:
    source = _source(tmp_path, {**_LLAMA, "model_type": "lama"})
    with pytest.raises(CheckpointError, match=r'config.json: transformers \S+ knows no model_type "lama"'):
        load_config(source, tmp_path)


def test_runs_no_code_that_comes_with_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "custom.py").write_text(f"import pathlib; pathlib.Path({str(tmp_path / 'ran')!r}).touch()")
    auto_map = {"AutoConfig": "custom.CustomConfig", "AutoModelForCausalLM": "custom.CustomModel"}
    assert load_config(_source(tmp_path, {**_LLAMA, "auto_map": auto_map}), tmp_path).model_type == "llama"
    source = _source(tmp_path, {**_LLAMA, "model_type": "custom", "auto_map": auto_map})
    with pytest.raises(CheckpointError, match="code that comes with a checkpoint is not run"):
        load_config(source, tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("length", [5, 30, 300, 2000])
def test_refuses_a_gguf_file_cut_short_in_its_header(tmp_path: Path, length: int) -> None:
    path = tmp_path / "tiny.gguf"
    write_tiny_gguf(path)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(CheckpointError, match=r"tiny.gguf can't be read \(.*\): it is damaged, cut short, or of"):
        load_config(find_checkpoint(str(path)), tmp_path)


def test_a_summary_is_one_short_line() -> None:
    assert summary(ValueError("two\n  lines")) == "two lines"
    assert summary(ValueError()) == "ValueError"
    assert len(summary(ValueError("word " * 1000))) <= 240
