import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from modcompile.corpus import builtin_documents
from modcompile.data import load_texts
from modcompile.data_config import DataConfig
from modcompile.errors import ConfigError, DataError


def write_jsonl(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_no_data_named() -> None:
    with pytest.raises(ConfigError, match="no data: give --dataset_name"):
        load_texts(DataConfig())


def test_builtin_has_both_splits() -> None:
    texts = load_texts(DataConfig(dataset_name="builtin"))
    assert set(texts) == {"train", "validation"}
    assert list(texts["train"]["text"]) == builtin_documents("train")
    assert list(texts["validation"]["text"]) == builtin_documents("validation")


def test_files_become_splits(tmp_path: Path) -> None:
    train = tmp_path / "train.txt"
    train.write_text("one\n\ntwo\n")
    validation = write_jsonl(tmp_path / "held_out.jsonl", [{"text": "three"}])
    texts = load_texts(DataConfig(train_file=str(train), validation_file=str(validation)))
    assert list(texts["train"]["text"]) == ["one\n", "\n", "two\n"]
    assert list(texts["validation"]["text"]) == ["three"]
    assert set(load_texts(DataConfig(train_file=str(train)))) == {"train"}


@pytest.mark.parametrize(
    ("records", "texts"),
    [
        ([{"title": "a", "text": "b"}], ["b"]),
        ([{"id": 1, "body": "a", "title": "b"}, {"id": 2, "body": None, "title": "c"}], ["a", None]),
        ([{"text": 7, "body": "a"}], ["a"]),
    ],
    ids=["the column text", "the first column of strings", "a column text that holds numbers"],
)
def test_finds_the_text_column(tmp_path: Path, records: list[dict[str, Any]], texts: list[str | None]) -> None:
    file = write_jsonl(tmp_path / "records.jsonl", records)
    train = load_texts(DataConfig(train_file=str(file)))["train"]
    assert train.column_names == ["text"]
    assert list(train["text"]) == texts


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([{"id": 1}, {"id": 2}], "no column of texts; its columns are: id"),
        ([{"text": ""}, {"text": "  \n"}, {"text": None}], "only blank texts in its column `text`"),
    ],
)
def test_rejects_records_without_text(tmp_path: Path, records: list[dict[str, Any]], message: str) -> None:
    file = write_jsonl(tmp_path / "records.jsonl", records)
    with pytest.raises(DataError, match=message):
        load_texts(DataConfig(train_file=str(file)))


def test_rejects_a_blank_validation_file(tmp_path: Path) -> None:
    train, validation = tmp_path / "train.txt", tmp_path / "validation.txt"
    train.write_text("one\n")
    validation.write_text("\n \n")
    with pytest.raises(DataError, match=r"the split `validation` of .* has only blank texts"):
        load_texts(DataConfig(train_file=str(train), validation_file=str(validation)))


def test_rejects_a_data_set_without_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "data"
    folder.mkdir()
    write_jsonl(folder / "test.jsonl", [{"text": "a"}])
    with pytest.raises(DataError, match="no split `train`, only: test"):
        load_texts(DataConfig(dataset_name=str(folder)))
