"""What is in a folder, to tell whether a command changed it."""

import hashlib
from pathlib import Path


def contents(folder: Path) -> dict[str, str]:
    """The hash of every file, by its path in the folder; folders themselves do not count."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
