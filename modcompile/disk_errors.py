"""Turn what goes wrong with a disk into errors a user can act on."""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from modcompile.errors import OutputError

_FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file would be larger than allowed",
}


def disk_full_reason(error: BaseException) -> str | None:
    """What ran out, if `error` says that a disk, a quota or a file size limit did.

    safetensors and tokenizers report the operating system's errors in their own types, with the number in the text.
    """
    if isinstance(error, OSError):
        return _FULL.get(error.errno or 0)
    match = re.search(r"\(os error (\d+)\)", str(error))
    return _FULL.get(int(match[1])) if match else None


@contextmanager
def output_errors(path: Path) -> Iterator[None]:
    """Raise what the operating system refuses in this block, which writes to `path` or beside it, as OutputError."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"{path} can't be written ({error.strerror or error}); choose another --output_dir"
        ) from error
