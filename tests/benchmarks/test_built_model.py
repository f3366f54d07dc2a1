from pathlib import Path

import pytest

from benchmarks.peers.built_model import build_once


def test_model_is_built_once(tmp_path: Path) -> None:
    built = []

    def build(folder: Path) -> dict[str, float]:
        built.append(folder)
        (folder / "model.onnx").write_bytes(b"x" * 2000)
        return {"verifying_seconds": 1.5}

    told = build_once(tmp_path / "model", build)
    assert told["megabytes"] == 0.002 and told["verifying_seconds"] == 1.5 and told["seconds"] >= 0
    assert build_once(tmp_path / "model", build) == told
    assert len(built) == 1


def test_model_that_fails_is_built_again(tmp_path: Path) -> None:
    def fail(folder: Path) -> dict[str, float]:
        (folder / "half.onnx").touch()
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        build_once(tmp_path / "model", fail)
    assert not (tmp_path / "model").exists()
    build_once(tmp_path / "model", lambda folder: {})
    assert [file.name for file in (tmp_path / "model").iterdir()] == ["built.json"]
