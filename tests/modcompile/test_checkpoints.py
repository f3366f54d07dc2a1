import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from modcompile.checkpoint_sources import find_checkpoint
from modcompile.checkpoints import load_base, load_tokenizer, save_base
from modcompile.errors import CheckpointError, ModcompileError, UnsupportedModelError
from tests.tiny_gguf import write_tiny_gguf
from tests.tiny_models import tiny_model


def _load(path: Path) -> PreTrainedModel:
    return load_base(find_checkpoint(str(path)))


def _assert_same(one: torch.nn.Module, other: torch.nn.Module) -> None:
    expected, actual = one.state_dict(), other.state_dict()
    assert expected.keys() == actual.keys()
    for name, tensor in expected.items():
        assert tensor.dtype == actual[name].dtype, name
        assert torch.equal(tensor, actual[name]), name


@pytest.fixture
def checkpoint(llama: PreTrainedModel, tmp_path: Path) -> Path:
    """The folder of a tiny LLaMA, as transformers writes it."""
    llama.save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def _edit(checkpoint: Path, name: str, tensor: torch.Tensor | None) -> None:
    """Replace one tensor of the weights, or remove it."""
    tensors = load_file(checkpoint / "model.safetensors")
    del tensors[name]
    if tensor is not None:
        tensors[name] = tensor
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})


def test_saves_what_transformers_and_we_load_bit_for_bit(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    save_base(model, tokenizer, tmp_path)
    files = {path.name for path in tmp_path.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= files
    _assert_same(model, AutoModelForCausalLM.from_pretrained(tmp_path))
    loaded = _load(tmp_path)
    _assert_same(model, loaded)
    assert type(loaded) is type(model)
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_keeps_the_stored_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_model("llama")
    torch.nn.Module.to(model, dtype)
    save_base(model, None, tmp_path)
    _assert_same(model, _load(tmp_path))


def test_loads_weights_in_several_files_and_saves_them_in_one(llama: PreTrainedModel, tmp_path: Path) -> None:
    llama.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 1
    loaded = _load(tmp_path / "sharded")
    _assert_same(llama, loaded)
    save_base(loaded, None, tmp_path / "saved")
    assert [path.name for path in (tmp_path / "saved").glob("*.safetensors")] == ["model.safetensors"]


def test_keeps_a_generation_config_that_contradicts_itself(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "generation_config.json").write_text(
        '{"do_sample": false, "temperature": 0.5, "eos_token_id": [2, 5]}'
    )
    model = _load(checkpoint)
    save_base(model, None, tmp_path / "saved")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").generation_config
    assert (saved.temperature, saved.eos_token_id) == (0.5, [2, 5])
    assert model.generation_config.temperature == 0.5


def test_says_nothing_where_there_is_nothing_to_say(
    checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    save_base(_load(checkpoint), None, tmp_path / "saved")
    assert capfd.readouterr() == ("", "")
    assert [record.message for record in caplog.records if record.levelno >= logging.WARNING] == []


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "lm_head.weight", "model.embed_tokens.weight"])
def test_names_missing_weights(checkpoint: Path, name: str) -> None:
    _edit(checkpoint, name, None)
    with pytest.raises(CheckpointError, match=f"llama has no weights for {name}; complete the checkpoint"):
        _load(checkpoint)


def test_names_missing_weights_that_are_used_twice(tmp_path: Path) -> None:
    tiny_model("gpt2").save_pretrained(tmp_path)
    _edit(tmp_path, "transformer.wte.weight", None)
    with pytest.raises(CheckpointError, match=r"has no weights for (transformer.wte|lm_head).weight"):
        _load(tmp_path)


def test_names_weights_that_do_not_fit_the_config(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "intermediate_size": 40}))
    with pytest.raises(
        CheckpointError, match=r"the shape of model.layers.0.mlp.down_proj.weight does not fit its config"
    ):
        _load(checkpoint)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_names_weights_that_are_no_numbers(checkpoint: Path, llama: PreTrainedModel, value: float) -> None:
    norm = llama.state_dict()["model.layers.2.input_layernorm.weight"].clone()
    norm[3] = value
    _edit(checkpoint, "model.layers.2.input_layernorm.weight", norm)
    with pytest.raises(CheckpointError, match=r"model.layers.2.input_layernorm.weight holds NaN or infinite weights"):
        _load(checkpoint)


def test_says_which_weights_are_not_used(
    checkpoint: Path, llama: PreTrainedModel, caplog: pytest.LogCaptureFixture
) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    assert _load(checkpoint).config.num_hidden_layers == 2
    (message,) = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert "llama holds 9 tensors that its model does not use, model.layers.2." in message


@pytest.mark.parametrize(("key", "value"), [("hidden_size", "large"), ("num_attention_heads", 5), ("vocab_size", -1)])
def test_refuses_a_config_that_makes_no_model(checkpoint: Path, key: str, value: object) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(CheckpointError, match="llama") as error:
        _load(checkpoint)
    assert "\n" not in str(error.value)


def test_a_flipped_header_byte_is_an_error_or_makes_no_difference(checkpoint: Path, llama: PreTrainedModel) -> None:
    path = checkpoint / "model.safetensors"
    content = path.read_bytes()
    header_size = 8 + int.from_bytes(content[:8], "little")
    messages: list[str] = []
    for position in range(0, header_size, 37):
        damaged = bytearray(content)
        damaged[position] ^= 1 << position % 7
        path.write_bytes(damaged)
        try:
            loaded = _load(checkpoint)
        except ModcompileError as error:
            messages.append(str(error))
        else:
            _assert_same(llama, loaded)
    assert len(messages) > header_size // 37 // 2
    assert not any("\n" in message for message in messages)


def test_refuses_weights_whose_type_is_no_float(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    content = path.read_bytes()
    name = b'"model.norm.weight":{"dtype":"'
    assert name + b"F32" in content
    path.write_bytes(content.replace(name + b"F32", name + b"I32"))
    with pytest.raises(CheckpointError, match=r"model.norm.weight is stored as I32|LlamaRMSNorm"):
        _load(checkpoint)


def test_refuses_an_encoder_with_and_without_a_head(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    for encoder in (BertForMaskedLM(BertConfig(**sizes)), BertModel(BertConfig(**sizes))):
        encoder.save_pretrained(tmp_path)
        with pytest.raises(UnsupportedModelError, match="BertLMHeadModel is an encoder"):
            _load(tmp_path)


def test_loads_a_gguf_file_as_an_ordinary_model(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_tiny_gguf(path)
    model = _load(path)
    stored = {tensor.name: torch.tensor(tensor.data) for tensor in GGUFReader(path).tensors}
    loaded = model.state_dict()
    assert torch.equal(loaded["model.embed_tokens.weight"], stored["token_embd.weight"])
    assert torch.equal(loaded["lm_head.weight"], stored["output.weight"])
    assert not any(parameter.requires_grad for parameter in model.parameters())
    save_base(model, None, tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    _assert_same(model, _load(tmp_path / "saved"))
    model.half()  # which transformers refuses for models that it takes for quantized


def test_refuses_a_gguf_file_cut_short_in_its_weights(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_tiny_gguf(path)
    content = path.read_bytes()
    for length in (len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r"tiny.gguf can't be read \(.*\): it is damaged, cut short") as error:
            _load(path)
        assert "\n" not in str(error.value)


def test_names_weights_that_a_gguf_file_lacks(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_tiny_gguf(path)
    path.write_bytes(path.read_bytes().replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_ap.weight"))
    with pytest.raises(CheckpointError, match=r"has no weights for model.layers.1.mlp.up_proj.weight"):
        _load(path)


def test_loads_the_tokenizer_of_a_folder(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    save_base(llama, tokenizer, tmp_path)
    text = "The same text,\n tokenized twice: 42."
    for loaded in (load_tokenizer(find_checkpoint(str(tmp_path))), AutoTokenizer.from_pretrained(tmp_path)):
        assert loaded is not None
        assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_transformers_4_is_told_what_the_tokenizer_makes(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    save_base(llama, tokenizer, tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["model_input_names"] == list(tokenizer("a text"))


def test_loads_the_tokenizer_of_a_gguf_file(tmp_path: Path) -> None:
    write_tiny_gguf(tmp_path / "tiny.gguf")
    loaded = load_tokenizer(find_checkpoint(str(tmp_path / "tiny.gguf")))
    assert loaded is not None
    ids = loaded("abBcd", add_special_tokens=False)["input_ids"]
    assert ids == [62, ord("B") - 63, 63]
    assert loaded.decode(ids) == "abBcd"


def test_a_model_may_come_without_a_tokenizer(checkpoint: Path, tmp_path: Path) -> None:
    write_tiny_gguf(tmp_path / "tiny.gguf", tokenizer=False)
    for path in (checkpoint, tmp_path / "tiny.gguf"):
        assert load_tokenizer(find_checkpoint(str(path))) is None


@pytest.mark.parametrize("content", ["{", "{}", '{"model": {"type": "BPE"}}'])
def test_refuses_a_damaged_tokenizer(checkpoint: Path, content: str) -> None:
    (checkpoint / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"the tokenizer of .*llama can't be loaded") as error:
        load_tokenizer(find_checkpoint(str(checkpoint)))
    assert "\n" not in str(error.value)
