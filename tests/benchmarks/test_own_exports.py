from pathlib import Path

import pytest

from benchmarks.peers.own_exports import Export, OwnCase
from benchmarks.peers.source import Source

EXPORT = Export("routed", ())


def test_skipped_blocks_lie_in_the_middle() -> None:
    assert OwnCase("", EXPORT, skipped=0.2).thresholds(10) == [0.0] * 4 + [2.0] * 2 + [0.0] * 4
    assert OwnCase("", EXPORT, skipped=0.0).thresholds(3) == [0.0] * 3


def test_without_a_share_the_export_decides() -> None:
    assert OwnCase("", EXPORT).thresholds(3) is None


@pytest.mark.slow
def test_commands_write_an_export_and_leave_nothing_else(base_folder: Path, tmp_path: Path) -> None:
    export = Export("routed", ("modcompile.rewrite {source} --output_dir {work} --export --always_active all",))
    output = tmp_path / "output"
    output.mkdir()
    told = export.build(Source("smollm2", base_folder, None), output)
    assert (output / "onnx" / "model.onnx").is_file()
    assert told["verifying_seconds"] > 0
    assert list(tmp_path.iterdir()) == [output]
