"""Models that are written once, and used again by a later run in the same folder."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

_TOLD = "built.json"
_MODEL_FILES = ("*.onnx", "*.onnx.data", "*.gguf")


def build_once(folder: Path, build: Callable[[Path], dict[str, float]]) -> dict[str, float]:
    """What there is to tell of a model: seconds, megabytes, and what `build` adds.

    `build` writes into a new folder, which appears as `folder` when it is whole.
    """
    if not folder.is_dir():
        staging = folder.with_name(f".{folder.name}")
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        start = perf_counter()
        told = build(staging)
        told["seconds"] = perf_counter() - start
        files = [file for pattern in _MODEL_FILES for file in staging.rglob(pattern)]
        told["megabytes"] = sum(file.stat().st_size for file in files) / 1e6
        (staging / _TOLD).write_text(json.dumps(told))
        staging.rename(folder)
    known: dict[str, float] = json.loads((folder / _TOLD).read_text())
    return known
