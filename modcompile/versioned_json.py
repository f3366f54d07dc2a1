"""JSON files of ours that say of which format they are."""

import json
from pathlib import Path
from typing import Any

from modcompile.errors import ArtifactError
from modcompile.version import __version__


def versioned(version: int, content: dict[str, Any]) -> dict[str, Any]:
    """`content` with the version of its format, and that of modcompile, to be written."""
    return {"format_version": version, "modcompile_version": __version__, **content}


def read_versioned(path: Path, version: int, *, again: str) -> dict[str, Any]:
    """Read a file; `again` is what to run for another.

    Raises:
        ArtifactError: it can't be read, is no such file, or of another version.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} is damaged ({error}); {again}") from error
    return parse_versioned(text, path, version, again=again)


def parse_versioned(text: str, path: Path, version: int, *, again: str) -> dict[str, Any]:
    """The same of what was read from `path`.

    Raises:
        ArtifactError: it is no such text, or of another version.
    """
    try:
        stored: dict[str, Any] = json.loads(text)
        found = stored["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path} is damaged ({error}); {again}") from error
    if found != version:
        raise ArtifactError(
            f"{path} has format {found}, this modcompile {__version__} reads format {version}; "
            f"{again}, or use the version that wrote it"
        )
    return stored
