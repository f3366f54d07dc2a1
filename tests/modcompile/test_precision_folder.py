from pathlib import Path

import pytest

from modcompile.any_precision_folder import AnyPrecisionCheckpoint
from modcompile.errors import ArtifactError, ConfigError
from modcompile.precision_folder import holds_precisions, read_precisions
from modcompile.quantized_folder import QuantizedCheckpoint
from tests.tiny_any_precision import tiny_any_precision, write_any_precision
from tests.tiny_quantized import BITS


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("theirs") / "folder"
    write_any_precision(tiny_any_precision(), folder)
    return folder


def test_knows_folders_of_both_kinds_and_no_others(
    quantized_folder: Path, theirs: Path, base_folder: Path, routed_folder: Path, tmp_path: Path
) -> None:
    assert holds_precisions(quantized_folder)
    assert holds_precisions(theirs)
    for other in (base_folder, routed_folder, tmp_path, tmp_path / "nowhere"):
        assert not holds_precisions(other)


def test_reads_each_by_its_kind(quantized_folder: Path, theirs: Path) -> None:
    read = read_precisions(quantized_folder)
    assert isinstance(read, QuantizedCheckpoint)
    assert read.precisions == BITS
    other = read_precisions(theirs)
    assert isinstance(other, AnyPrecisionCheckpoint)
    assert other.precisions == [3, 4, 5, 6, 7, 8]


def test_reads_some_precisions_of_each(quantized_folder: Path, theirs: Path) -> None:
    assert read_precisions(quantized_folder, [16, 2]).precisions == [2, 16]
    assert read_precisions(theirs, [6, 4]).precisions == [4, 6]
    for folder in (quantized_folder, theirs):
        with pytest.raises(ConfigError, match="has no weights of 9 bits"):
            read_precisions(folder, [9])


def test_names_a_folder_of_neither_kind(base_folder: Path) -> None:
    with pytest.raises(ArtifactError, match=r"was not made by modcompile\.quantize"):
        read_precisions(base_folder)
