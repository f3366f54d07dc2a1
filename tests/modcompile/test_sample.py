import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from modcompile.data import load_texts
from modcompile.data_config import DataConfig
from modcompile.errors import ConfigError, DataError, OutputError
from modcompile.sample import main

_FEW = ["--texts", "3", "--tokens_per_text", "9", "--batch_size", "2"]


def test_writes_a_file_to_train_on(base_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "texts.jsonl"
    main([str(base_folder), "--output_file", str(path), *_FEW])
    written = [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(written) == 3
    assert list(load_texts(DataConfig(train_file=str(path)))["train"]["text"]) == written
    assert capsys.readouterr().out == f"wrote {path}: 3 texts of 9 tokens\n"
    assert [file.name for file in tmp_path.iterdir()] == ["texts.jsonl"]


def test_the_seed_decides(base_folder: Path, tmp_path: Path) -> None:
    for name, seed in (("first", "1"), ("again", "1"), ("other", "2")):
        main([str(base_folder), "--output_file", str(tmp_path / f"{name}.jsonl"), "--seed", seed, *_FEW])
    first, again, other = ((tmp_path / f"{name}.jsonl").read_text() for name in ("first", "again", "other"))
    assert first == again
    assert first != other


@pytest.mark.parametrize(
    ("flags", "error", "message"),
    [
        (["--output_file", "texts.txt"], ConfigError, "--output_file is 'texts.txt'; its name must end in .jsonl"),
        (["--texts", "0"], ConfigError, "--texts is 0"),
        (["--tokens_per_text", "1"], ConfigError, "--tokens_per_text is 1"),
        (["--batch_size", "0"], ConfigError, "--batch_size is 0"),
        (["--temperature", "0"], ConfigError, "--temperature is 0"),
        (["--output_file", "no/such/texts.jsonl"], OutputError, "is not a folder"),
        (["--tokens_per_text", "129"], ConfigError, "the model has 128 positions"),
    ],
)
def test_refuses_in_a_line(
    base_folder: Path,
    flags: list[str],
    error: type[Exception],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        main([str(base_folder), *flags])
    assert not list(tmp_path.iterdir())


def test_keeps_what_is_there(base_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text("mine")
    with pytest.raises(OutputError, match="exists; choose another --output_file"):
        main([str(base_folder), "--output_file", str(path)])
    assert path.read_text() == "mine"


def test_needs_a_tokenizer(base_folder: Path, tmp_path: Path) -> None:
    for file in base_folder.iterdir():
        if not file.name.startswith("tokenizer"):
            (tmp_path / file.name).symlink_to(file)
    with pytest.raises(DataError, match="no tokenizer"):
        main([str(tmp_path), "--output_file", str(tmp_path / "texts.jsonl")])


def test_writes_no_special_tokens(base_folder: Path, tmp_path: Path) -> None:
    """No token that ends a text or begins one, though an untrained model finds all alike."""
    path = tmp_path / "texts.jsonl"
    main([str(base_folder), "--output_file", str(path), "--texts", "8", "--tokens_per_text", "60"])
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    for line in path.read_text(encoding="utf-8").splitlines():
        assert not set(tokenizer(json.loads(line)["text"]).input_ids) & set(tokenizer.all_special_ids)
