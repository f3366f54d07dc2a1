import json
import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from modcompile.durable_files import make_durable, replace_file, write_json
from modcompile.errors import OutputError


def test_writes_json_that_any_parser_reads(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    write_json(path, {"text": "“é”", "loss": float("nan"), "layers": (0.5, float("inf")), "none": None})

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    read = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    assert read == {"text": "“é”", "loss": None, "layers": [0.5, None], "none": None}
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("before")

    def write(staging: Path) -> None:
        staging.write_text("half")
        raise ValueError("interrupted")

    with pytest.raises(ValueError, match="interrupted"):
        replace_file(path, write)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_says_that_a_file_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"report.json can't be written \(No such file or directory\)"):
        write_json(tmp_path / "missing" / "report.json", {})


def test_gives_files_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    weights = tmp_path / "folder" / "model.safetensors"
    save_file({"a": torch.zeros(1)}, weights)
    old = os.umask(0o027)
    try:
        make_durable(tmp_path)
    finally:
        os.umask(old)
    assert stat.S_IMODE(weights.stat().st_mode) == 0o640
