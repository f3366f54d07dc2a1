"""Reads data sets and files, and turns whatever goes wrong into one line."""

import glob
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import datasets
from datasets import Dataset, DatasetDict
from huggingface_hub import HfApi
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError

from modcompile.errors import DataError
from modcompile.progress import show_elapsed

_READERS = {".txt": ("text", {"keep_linebreaks": True}), ".json": ("json", {}), ".jsonl": ("json", {})}
_HUB_TIMEOUT = 10.0  # seconds
_MAX_REASON = 300  # characters


def load_named_dataset(name: str, config_name: str | None = None) -> DatasetDict:
    """All splits of a data set on the hub, or of a local folder of data files.

    Raises:
        DataError: no such data set or configuration, no access to it, the hub out of reach, or unreadable files.
    """
    local = Path(name).is_dir()
    if not local:
        _check_hub(name)
    with _show_reading(name) if local else nullcontext():
        try:
            splits = datasets.load_dataset(name, config_name)
        # The readers behind load_dataset raise what they like, StopIteration included.
        except Exception as error:
            raise DataError(f"can't load the data set {name!r}: {_reason(error)}") from error
    assert isinstance(splits, DatasetDict)
    return splits


def load_text_dataset(path: str) -> Dataset:
    """A .txt file, one row a line with its line break, or a .json or .jsonl file, one row a record; held in memory.

    Raises:
        DataError: the file is missing, empty, of another type, malformed or not UTF-8.
    """
    reader, options = _READERS.get(Path(path).suffix.lower(), (None, {}))
    if reader is None:
        raise DataError(f"{path} is not of a type that can be read: {', '.join(_READERS)}")
    _check_file(path)
    # The reader keeps a copy of all it reads; in a folder of ours it does not outlive the call.
    with tempfile.TemporaryDirectory() as cache_dir, _show_reading(path):
        try:
            dataset = datasets.load_dataset(
                reader,
                data_files=glob.escape(str(Path(path).absolute())),
                split="train",
                cache_dir=cache_dir,
                keep_in_memory=True,
                **options,
            )
            # The JSON reader passes bytes on that are no UTF-8; they would fail at the first use.
            dataset.data.validate(full=True)
        except Exception as error:
            raise DataError(f"can't read {path}: {_reason(error)}") from error
    assert isinstance(dataset, Dataset)
    return dataset


def read_text_file(path: str) -> list[str]:
    """The documents of a text file: the blocks of lines between blank ones.

    Raises:
        DataError: the file is missing, blank or not UTF-8.
    """
    _check_file(path)
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"can't read {path}: {_reason(error)}") from error
    documents = [block.strip() for block in re.split(r"\n\s*\n", text) if block.strip()]
    if not documents:
        raise DataError(f"{path} holds only blank lines")
    return documents


def _check_hub(name: str) -> None:
    """Ask for the data set once: `load_dataset` would try for half a minute before it gives up."""
    if datasets.config.HF_HUB_OFFLINE:
        return  # load_dataset then looks into its cache only, at once
    try:
        HfApi().dataset_info(name, timeout=_HUB_TIMEOUT)
    except HFValidationError as error:
        raise DataError(f"{name!r} is neither a folder nor a name that a data set on the hub can have") from error
    except GatedRepoError as error:
        raise DataError(f"the data set {name!r} is gated: accept its terms on the hub, and log in") from error
    except RepositoryNotFoundError as error:
        raise DataError(f"the hub has no data set {name!r}, or shows it only to those who log in") from error
    except HfHubHTTPError as error:
        raise DataError(f"the hub did not give the data set {name!r}: {_reason(error)}") from error
    # Which class a failed connection has depends on the version of the hub's library.
    except Exception as error:
        raise DataError(
            f"the hub can't be reached for the data set {name!r} ({type(error).__name__}): check the network, set "
            "HF_HUB_OFFLINE=1 to use a copy in the cache, or give a local file"
        ) from error


def _check_file(path: str) -> None:
    if not Path(path).is_file():
        raise DataError(f"{path} is not a file" if Path(path).exists() else f"{path} does not exist")
    if not Path(path).stat().st_size:
        raise DataError(f"{path} is empty")


def _reason(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, UnicodeDecodeError):
        return "it is not UTF-8"
    return " ".join(str(error).split())[:_MAX_REASON] or type(error).__name__


@contextmanager
def _show_reading(source: str) -> Iterator[None]:
    """The bars of `datasets` come at once and stay; a local source is mostly read before one is worth looking at."""
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        with show_elapsed(f"Reading {source}"):
            yield
    finally:
        if shown:
            datasets.enable_progress_bars()
