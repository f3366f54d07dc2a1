"""Files that outlive a crash: complete and on the disk before they get their name."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from modcompile.disk_errors import output_errors


def write_json(path: Path, data: Any) -> None:
    """Replace `path` with `data` as JSON. NaN and infinite numbers become null: JSON has no word for them.

    Raises:
        OutputError: it can't be written; what was there before still is.
    """
    text = json.dumps(_finite(data), indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    replace_file(path, lambda staging: staging.write_text(text, encoding="utf-8"))


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file beside `path`, then move it there.

    Raises:
        OutputError: it can't be written; what was there before still is.
    """
    staging = path.with_name(f".{path.name}.partial-{os.getpid()}")
    with output_errors(path):
        try:
            write(staging)
            make_durable(staging)
            staging.replace(path)
        finally:
            staging.unlink(missing_ok=True)
        sync(path.parent)


def make_durable(path: Path) -> None:
    """Bring a file, or a folder with all that is in it, to the disk, with the permissions that new files usually get.

    safetensors makes its files readable for their owner alone.
    """
    if path.is_dir():
        for child in path.iterdir():
            make_durable(child)
    elif not path.is_symlink():
        path.chmod(0o666 & ~_umask())
    sync(path)


def sync(path: Path) -> None:
    """Have the operating system bring what it holds of one file, or of a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0o077)  # It can't be read without being set.
    os.umask(mask)
    return mask


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
