"""Folders of weights at several precisions, whoever wrote them."""

from collections.abc import Sequence
from pathlib import Path

from modcompile.any_precision_folder import is_any_precision_folder, read_any_precision_folder
from modcompile.precision_branches import PrecisionCheckpoint
from modcompile.quantized_folder import is_quantized_folder, read_quantized_folder


def holds_precisions(folder: Path) -> bool:
    """Whether a folder was made by `modcompile.quantize`, or by any-precision-llm."""
    return is_quantized_folder(folder) or is_any_precision_folder(folder)


def read_precisions(folder: Path, precisions: Sequence[int] | None = None) -> PrecisionCheckpoint:
    """Read such a folder for some of its precisions, by default all.

    Raises:
        ArtifactError: the folder is missing, incomplete, damaged, or of another version.
        CheckpointError: its base can't be read.
        ConfigError: it lacks one of `precisions`.
    """
    if is_any_precision_folder(folder):
        return read_any_precision_folder(folder, precisions)
    return read_quantized_folder(folder, precisions)
