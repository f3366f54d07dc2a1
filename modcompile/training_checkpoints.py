"""Checkpoints of a training, `checkpoint-{step}` in its output folder: routers, optimizer, scheduler, random state."""

import json
import re
from pathlib import Path

from modcompile.errors import ArtifactError

_NAME = re.compile(r"checkpoint-(\d+)")
_STATE = "trainer_state.json"  # what the HF Trainer writes last


def training_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, those cut short included, in the order of their steps."""
    found = {path: _NAME.fullmatch(path.name) for path in folder.glob("checkpoint-*") if path.is_dir()}
    steps = {path: int(match[1]) for path, match in found.items() if match is not None}
    return sorted(steps, key=steps.__getitem__)


def find_training_checkpoint(folder: Path, wanted: str) -> Path:
    """The checkpoint to resume from: a path, or with `true` the last whole one in `folder`.

    Raises:
        ArtifactError: there is none, or the one that is wanted was cut short.
    """
    if wanted.lower() == "true":
        whole = [path for path in training_checkpoints(folder) if _is_whole(path)]
        if not whole:
            raise ArtifactError(f"{folder} holds no checkpoint; train without --resume_from_checkpoint")
        return whole[-1]
    path = Path(wanted)
    if not path.is_dir():
        raise ArtifactError(f"{path} is not the folder of a checkpoint; give one, or `true` for the last in {folder}")
    if not _is_whole(path):
        raise ArtifactError(f"{path} is no whole checkpoint: it has no readable {_STATE}; give an earlier one")
    return path


def _is_whole(checkpoint: Path) -> bool:
    try:
        return isinstance(json.loads((checkpoint / _STATE).read_text(encoding="utf-8")), dict)
    except (OSError, ValueError):
        return False
