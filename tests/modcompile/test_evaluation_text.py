import shutil
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from modcompile.corpus import builtin_documents
from modcompile.errors import ArtifactError, ConfigError, DataError
from modcompile.evaluation_text import (
    EvaluationTextConfig,
    describe_text,
    load_calibration_blocks,
    load_evaluation_blocks,
    text_as_json,
)
from modcompile.packing import tokenize_and_pack


def test_text_file_is_one_document(tmp_path: Path, base_folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """As a .txt file is in training: no end of text between its blocks."""
    path = tmp_path / "a.txt"
    path.write_text("one two\nthree\n\n\nfour\n")
    blocks = load_evaluation_blocks(EvaluationTextConfig(text_file=str(path), sequence_length=8), base_folder)
    tokens = [token for row in blocks for token in row["input_ids"][: sum(row["attention_mask"])]]
    assert tokenizer.decode(tokens) == "one two\nthree\n\nfour"
    assert tokenizer.eos_token_id not in tokens


def test_builtin_text_is_the_test_split(base_folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    blocks = load_evaluation_blocks(EvaluationTextConfig(sequence_length=64), base_folder)
    assert blocks.to_dict() == tokenize_and_pack(builtin_documents("test"), tokenizer, 64).to_dict()


def test_samples_are_drawn_from_the_whole_text(base_folder: Path) -> None:
    whole = load_evaluation_blocks(EvaluationTextConfig(sequence_length=64), base_folder)["input_ids"]
    configs = [EvaluationTextConfig(sequence_length=64, max_samples=5, seed=seed) for seed in (1, 2, 1)]
    drawn = [list(load_evaluation_blocks(config, base_folder)["input_ids"]) for config in configs]
    assert drawn[0] == drawn[2] != drawn[1]
    for rows in drawn:
        positions = [list(whole).index(row) for row in rows]
        assert positions == sorted(set(positions))
        assert len(positions) == 5
    everything = EvaluationTextConfig(sequence_length=64, max_samples=len(whole))
    assert list(load_evaluation_blocks(everything, base_folder)["input_ids"]) == list(whole)


def test_calibration_is_drawn_from_the_validation_split(base_folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    config = EvaluationTextConfig(sequence_length=64, text_file="not asked for", max_samples=1)
    whole = tokenize_and_pack(builtin_documents("validation"), tokenizer, 64)
    drawn = load_calibration_blocks(config, base_folder, 3)
    assert drawn.num_rows == 3
    assert all(row in list(whole) for row in drawn)
    assert load_calibration_blocks(config, base_folder, 10**6).to_dict() == whole.to_dict()


def test_sequence_may_be_as_long_as_the_model(base_folder: Path) -> None:
    blocks = load_evaluation_blocks(EvaluationTextConfig(sequence_length=128, max_samples=1), base_folder)
    assert len(blocks[0]["input_ids"]) == 128
    with pytest.raises(ConfigError, match="--sequence_length 129 is above the 128 positions of the model"):
        load_evaluation_blocks(EvaluationTextConfig(sequence_length=129), base_folder)


def test_says_what_is_missing(base_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"missing\.txt does not exist"):
        load_evaluation_blocks(EvaluationTextConfig(text_file="missing.txt"), base_folder)
    folder = Path(shutil.copytree(base_folder, tmp_path / "own"))
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ArtifactError, match="own has no tokenizer"):
        load_evaluation_blocks(EvaluationTextConfig(sequence_length=64), folder)


def test_tells_how_much_of_which_text_it_was() -> None:
    config = EvaluationTextConfig(text_file="a.txt", sequence_length=64)
    assert describe_text(config, 1200, 75600) == "75,600 predicted tokens of a.txt, 1,200 sequences of up to 64"
    numbers = {"sequence_length": 64, "sequences": 1200, "predicted_tokens": 75600}
    assert text_as_json(config, 1200, 75600) == {"text": "a.txt", **numbers}
    assert text_as_json(EvaluationTextConfig(), 1, 1)["text"] == "the built-in test split"
