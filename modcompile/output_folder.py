"""Write a folder as a whole or not at all.

A folder is written beside its place, under a hidden name, and moved there once it is complete. Whatever ends the
process in between (an error, an interrupt, a full disk, a kill), the place holds what it held before.
"""

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from modcompile.disk_errors import disk_full_reason, output_errors
from modcompile.durable_files import make_durable, sync
from modcompile.errors import ModcompileError, OutputError

_NEARLY_FULL = 2**16  # bytes


@contextmanager
def staged_folder(path: str | Path, *, overwrite: bool, is_ours: Callable[[Path], bool]) -> Iterator[Path]:
    """Yield a new folder that becomes `path` when the block ends, and vanishes when the block raises.

    What is at `path` is replaced if it is empty, if `is_ours(path)`, or with `overwrite`.

    Raises:
        OutputError: `path` must not be replaced (see `check_writable_target`), can't be written, or fills the disk.
    """
    target = check_writable_target(path, overwrite=overwrite, is_ours=is_ours)
    staging, replaced = _hidden(target, "partial"), _hidden(target, "replaced")
    with output_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        _clean_up(target)
        staging.mkdir()
    try:
        try:
            yield staging
        except Exception as error:
            reason = _disk_full_reason(error, staging)
            if reason is None:
                raise
            raise OutputError(
                f"{target} can't be written: {reason}; make room, or choose another --output_dir"
            ) from error
        with output_errors(target):
            make_durable(staging)
        # Again, as minutes may have passed.
        check_writable_target(target, overwrite=overwrite, is_ours=is_ours)
        with output_errors(target):
            _swap(staging, target, replaced)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if target.exists():
            shutil.rmtree(replaced, ignore_errors=True)


def check_writable_target(path: str | Path, *, overwrite: bool, is_ours: Callable[[Path], bool]) -> Path:
    """Check that `staged_folder` would write to `path`, without writing; return the path in its absolute form.

    Raises:
        OutputError: `path` is a file, the current or the home folder or one that holds either, a mount point, or a
            folder with something in it that is not ours (unless `overwrite`); or no folder can be made there.
    """
    try:
        target = Path(path).expanduser().resolve()
    except RuntimeError as error:
        raise OutputError(f"{path}: {error}; choose another --output_dir") from error
    with output_errors(target):
        if target.exists() and not target.is_dir():
            raise OutputError(f"{target} is a file; choose another --output_dir")
        for name, kept in _kept_folders():
            if target == kept or target in kept.parents:
                raise OutputError(f"{target} is or holds {name}, which is never replaced; choose a new folder in it")
        if target.is_mount():
            raise OutputError(f"{target} is a mount point, which can't be replaced; choose a new folder in it")
        existing = next(parent for parent in target.parents if parent.exists())
        if not existing.is_dir():
            raise OutputError(f"{existing} is a file, so {target} can't be made; choose another --output_dir")
        if not os.access(existing, os.W_OK | os.X_OK):
            raise OutputError(f"{existing} is not writable, so {target} can't be made; choose another --output_dir")
        if target.is_dir() and any(target.iterdir()) and not overwrite and not is_ours(target):
            raise OutputError(
                f"{target} exists and was not made by modcompile; choose another --output_dir or pass "
                "--overwrite_output_dir"
            )
    return target


def _kept_folders() -> Iterator[tuple[str, Path]]:
    yield "the current folder", Path.cwd()
    with suppress(RuntimeError):  # a user without a home
        yield "the home folder", Path.home().resolve()


def _disk_full_reason(error: Exception, staging: Path) -> str | None:
    if isinstance(error, ModcompileError):
        return None
    reason = disk_full_reason(error)
    # torch.save says only that it could not go on.
    return reason or ("the disk is full" if shutil.disk_usage(staging.parent).free < _NEARLY_FULL else None)


def _swap(staging: Path, target: Path, replaced: Path) -> None:
    """Move `staging` to `target`, and what is there to `replaced`; whatever goes wrong, `target` is one of the two."""
    try:
        if target.exists():
            target.rename(replaced)
        staging.rename(target)
    except BaseException:
        if replaced.exists() and not target.exists():
            replaced.rename(target)
        raise
    sync(target.parent)


def _clean_up(target: Path) -> None:
    """Remove what processes left that were killed while they wrote to `target`, and undo a swap cut in two."""
    pattern = re.compile(re.escape(f".{target.name}.") + r"(partial|replaced)-(\d+)")
    for path in target.parent.iterdir():
        match = pattern.fullmatch(path.name)
        if match is None or _is_running(int(match[2])):
            continue
        if match[1] == "replaced" and not target.exists():
            path.rename(target)
        else:
            shutil.rmtree(path)


def _hidden(target: Path, state: str) -> Path:
    return target.with_name(f".{target.name}.{state}-{os.getpid()}")


def _is_running(process: int) -> bool:
    if process == os.getpid():
        return False  # a namesake: this process has nothing staged yet
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
