from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from modcompile.disk_errors import disk_full_reason, output_errors
from modcompile.errors import OutputError


def test_tells_a_full_disk_from_other_errors() -> None:
    with pytest.raises(OSError, match="No space") as full:
        Path("/dev/full").write_bytes(b"x")
    assert disk_full_reason(full.value) == "the disk is full"
    with pytest.raises(OSError, match="No such file") as missing:
        Path("/missing/file").read_bytes()
    assert disk_full_reason(missing.value) is None
    assert disk_full_reason(ValueError("no number")) is None


def test_reads_the_number_that_safetensors_reports(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(Exception, match=r"os error 20") as not_a_folder:
        save_file({"a": torch.zeros(1)}, tmp_path / "file" / "model.safetensors")
    assert disk_full_reason(not_a_folder.value) is None
    text = str(not_a_folder.value).replace("os error 20", "os error 28")
    assert disk_full_reason(type(not_a_folder.value)(text)) == "the disk is full"


def test_names_what_the_system_refuses(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match=r"out can't be written \(No such file or directory\)"),
        output_errors(Path("out")),
    ):
        (tmp_path / "missing" / "file").write_text("x")
