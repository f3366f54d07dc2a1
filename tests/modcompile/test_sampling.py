import json
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig, PreTrainedTokenizerFast

from modcompile.errors import ArtifactError, ConfigError
from modcompile.sampling import SamplingConfig, load_generation_config
from tests.tiny_routed import tiny_base
from tests.tiny_tokenizer import make_tokenizer


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "--max_new_tokens is 0"),
        ({"seed": -1}, "--seed is -1"),
        ({"seed": 2**63}, "--seed is"),
        ({"temperature": 0.5}, "--temperature has no effect without --do_sample"),
        ({"top_k": 5}, "--top_k has no effect without --do_sample"),
        ({"top_p": 0.5}, "--top_p has no effect without --do_sample"),
        ({"do_sample": True, "temperature": 0.0}, "--temperature is 0"),
        ({"do_sample": True, "temperature": float("nan")}, "--temperature is nan"),
        ({"do_sample": True, "temperature": float("inf")}, "--temperature is inf"),
        ({"do_sample": True, "top_k": -1}, "--top_k is -1"),
        ({"do_sample": True, "top_p": 0.0}, "--top_p is 0"),
        ({"do_sample": True, "top_p": 1.1}, "--top_p is 1.1"),
    ],
)
def test_rejects_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SamplingConfig(**options)


def test_greedy_takes_nothing_of_sampling(tokenizer: PreTrainedTokenizerFast) -> None:
    stored = GenerationConfig(do_sample=True, temperature=0.6, top_p=0.9, repetition_penalty=1.3, eos_token_id=[5, 6])
    config = SamplingConfig(max_new_tokens=7).generation_config(stored, tokenizer)
    expected = GenerationConfig(max_new_tokens=7, do_sample=False, eos_token_id=[5, 6], pad_token_id=5)
    assert config.to_diff_dict() == expected.to_diff_dict()


@pytest.mark.parametrize(
    ("given", "stored", "expected"),
    [
        ({}, {}, (1.0, 50, 1.0)),
        ({}, {"temperature": 0.6, "top_k": 7, "top_p": 0.9}, (0.6, 7, 0.9)),
        ({"temperature": 2.0, "top_p": 1.0}, {"temperature": 0.6, "top_p": 0.9}, (2.0, 50, 1.0)),
        ({"top_k": 0}, {"top_k": 7}, (1.0, 0, 1.0)),
    ],
    ids=["nothing", "stored", "given over stored", "0 is given too"],
)
def test_sampling_is_what_was_given_or_stored(
    tokenizer: PreTrainedTokenizerFast,
    given: dict[str, Any],
    stored: dict[str, Any],
    expected: tuple[float, int, float],
) -> None:
    stored_config = GenerationConfig(do_sample=True, eos_token_id=2, **stored)
    config = SamplingConfig(do_sample=True, **given).generation_config(stored_config, tokenizer)
    assert config.do_sample
    assert (config.temperature, config.top_k, config.top_p) == expected


def test_special_tokens_are_those_of_the_model(tokenizer: PreTrainedTokenizerFast) -> None:
    stored = GenerationConfig(bos_token_id=1, eos_token_id=4, pad_token_id=0)
    config = SamplingConfig().generation_config(stored, tokenizer)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 4, 0)


def test_end_is_the_tokenizers_where_the_model_names_none(tokenizer: PreTrainedTokenizerFast) -> None:
    config = SamplingConfig().generation_config(GenerationConfig(), tokenizer)
    assert config.eos_token_id == config.pad_token_id == tokenizer.eos_token_id == 2
    endless = make_tokenizer()
    endless.eos_token = None
    assert SamplingConfig().generation_config(GenerationConfig(), endless).eos_token_id is None


def test_reads_the_file(tmp_path: Path) -> None:
    # As checkpoints have it, though transformers would not write it: a temperature without do_sample.
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 4], "temperature": 0.6}))
    config = load_generation_config(tmp_path, tiny_base().config)
    assert config.eos_token_id == [3, 4]
    assert config.temperature == 0.6


def test_without_a_file_the_model_tells(tmp_path: Path) -> None:
    config = load_generation_config(tmp_path, tiny_base().config)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 0)


def test_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"generation_config\.json can't be read"):
        load_generation_config(tmp_path, tiny_base().config)
