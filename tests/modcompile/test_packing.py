from itertools import chain
from pathlib import Path

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from modcompile.corpus import builtin_documents
from modcompile.data_config import DataConfig
from modcompile.errors import ConfigError, DataError
from modcompile.packing import load_blocks, tokenize_and_pack
from tests.tiny_tokenizer import make_tokenizer


def kept_tokens(blocks: Dataset) -> list[int]:
    ids, mask = chain.from_iterable(blocks["input_ids"]), chain.from_iterable(blocks["attention_mask"])
    return [token for token, keep in zip(ids, mask, strict=True) if keep]


def ids_of(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


documents = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=40), min_size=1, max_size=8)


@given(texts=documents, sequence_length=st.integers(2, 17))
def test_keeps_every_token_in_order(tokenizer: PreTrainedTokenizerFast, texts: list[str], sequence_length: int) -> None:
    expected: list[int] = []
    continues = False
    for text in filter(None, texts):
        expected += [] if continues or not expected else [tokenizer.eos_token_id]
        expected += ids_of(tokenizer, text)
        continues = text.endswith("\n")
    if len(expected) < 2:
        with pytest.raises(DataError, match="fewer than two tokens"):
            tokenize_and_pack(texts, tokenizer, sequence_length)
        return
    if len(expected) % sequence_length == 1:
        expected.pop()  # a block of one token has nothing to predict
    blocks = tokenize_and_pack(texts, tokenizer, sequence_length)
    assert kept_tokens(blocks) == expected
    assert all(len(column) == sequence_length for name in blocks.column_names for column in blocks[name])


def test_pads_the_last_block_on_the_right(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = ids_of(tokenizer, "abcdefg")
    assert len(ids) == 7
    blocks = tokenize_and_pack(["abcdefg"], tokenizer, 4)
    assert blocks.to_dict() == {
        "input_ids": [ids[:4], [*ids[4:], tokenizer.pad_token_id]],
        "attention_mask": [[1, 1, 1, 1], [1, 1, 1, 0]],
        "labels": [ids[:4], [*ids[4:], -100]],
    }


def test_lines_of_a_document_are_tokenized_as_one_text() -> None:
    tokenizer = make_tokenizer(adds_bos=True)
    bos, eos = [tokenizer.bos_token_id], [tokenizer.eos_token_id]
    lines = ["one two\n", "\n", None, "", "three", "another"]
    blocks = tokenize_and_pack(lines, tokenizer, 64)
    expected = bos + ids_of(tokenizer, "one two\n\nthree") + eos + bos + ids_of(tokenizer, "another")
    assert kept_tokens(blocks) == expected


def test_one_token_for_start_and_end_parts_documents_once() -> None:
    tokenizer = make_tokenizer(adds_bos=True)
    tokenizer.eos_token = tokenizer.bos_token
    bos = [tokenizer.bos_token_id]
    blocks = tokenize_and_pack(["one", "two"], tokenizer, 64)
    assert kept_tokens(blocks) == bos + ids_of(tokenizer, "one") + bos + ids_of(tokenizer, "two")


def test_tokenizer_without_eos_and_padding() -> None:
    tokenizer = make_tokenizer()
    tokenizer.eos_token = tokenizer.pad_token = tokenizer.bos_token = None
    blocks = tokenize_and_pack(["one", "two"], tokenizer, 64)
    assert kept_tokens(blocks) == ids_of(tokenizer, "one") + ids_of(tokenizer, "two")


def test_long_documents_raise_no_warning(tokenizer: PreTrainedTokenizerFast, capfd: pytest.CaptureFixture[str]) -> None:
    document = builtin_documents("test")[0] * 10
    assert len(ids_of(tokenizer, document)) > tokenizer.model_max_length
    capfd.readouterr()
    tokenize_and_pack([document], make_tokenizer(), 64)
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


@pytest.mark.parametrize(
    ("sequence_length", "message"),
    [(1, "--sequence_length is 1"), (65, "--sequence_length 65 is above the 64 positions of the model")],
)
def test_rejects_sequence_lengths(tokenizer: PreTrainedTokenizerFast, sequence_length: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tokenize_and_pack(["some text"], tokenizer, sequence_length, max_positions=64)


def test_too_short_a_text_is_named(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match=r"a\.txt has fewer than two tokens"):
        tokenize_and_pack(["x"], tokenizer, 8, source="a.txt")


def test_blocks_of_the_builtin_data_hold_its_text(tokenizer: PreTrainedTokenizerFast) -> None:
    config = DataConfig(dataset_name="builtin", sequence_length=128)
    blocks = load_blocks(config, tokenizer, max_positions=128)
    text = tokenizer.decode(kept_tokens(blocks["validation"]), clean_up_tokenization_spaces=False)
    assert str(text).split(str(tokenizer.eos_token)) == builtin_documents("validation")
    again = load_blocks(config, tokenizer)
    assert {split: again[split].to_dict() for split in again} == {split: blocks[split].to_dict() for split in blocks}


def test_limits_count_sequences(tokenizer: PreTrainedTokenizerFast) -> None:
    config = DataConfig(dataset_name="builtin", sequence_length=32, max_train_samples=5, max_eval_samples=10**6)
    blocks = load_blocks(config, tokenizer)
    whole = load_blocks(DataConfig(dataset_name="builtin", sequence_length=32), tokenizer)
    assert blocks["train"].to_dict() == whole["train"].take(5).to_dict()
    assert blocks["validation"].num_rows == whole["validation"].num_rows


@pytest.mark.parametrize(
    ("tokens", "percentage", "held_out"),
    [(1000, 1.0, 16), (1000, 10.0, 96), (1000, 99.0, 500), (20, 1.0, 10), (4, 1.0, 2)],
    ids=["one sequence", "whole sequences", "half at most", "half of a short text", "shortest text"],
)
def test_missing_validation_split_is_cut_from_train(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, tokens: int, percentage: float, held_out: int
) -> None:
    text = "x1" * (tokens // 2)
    file = tmp_path / "a.txt"
    file.write_text(text)
    assert len(ids_of(tokenizer, text)) == tokens
    config = DataConfig(train_file=str(file), sequence_length=16, validation_split_percentage=percentage)
    blocks = load_blocks(config, tokenizer)
    validation, train = kept_tokens(blocks["validation"]), kept_tokens(blocks["train"])
    assert len(validation) == held_out
    assert validation + train == ids_of(tokenizer, text)


def test_validation_file_leaves_train_whole(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    train, validation = tmp_path / "train.txt", tmp_path / "validation.txt"
    train.write_text("x1x1")
    validation.write_text("y2")
    config = DataConfig(train_file=str(train), validation_file=str(validation), sequence_length=16)
    blocks = load_blocks(config, tokenizer)
    assert kept_tokens(blocks["train"]) == ids_of(tokenizer, "x1x1")
    assert kept_tokens(blocks["validation"]) == ids_of(tokenizer, "y2")


def test_too_short_to_hold_anything_out(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    file = tmp_path / "a.txt"
    file.write_text("x1x")
    with pytest.raises(DataError, match=r"a\.txt has fewer than four tokens"):
        load_blocks(DataConfig(train_file=str(file)), tokenizer)


def test_sequence_length_is_checked_before_anything_is_read(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigError, match="above the 64 positions"):
        load_blocks(DataConfig(train_file="missing.txt"), tokenizer, max_positions=64)
