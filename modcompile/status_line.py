"""A line that stays at the bottom of a terminal while text scrolls above it."""

import os
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TextIO

_INTERVAL = 0.1  # seconds
_MIN_ROWS = 3
_SAVE, _RESTORE = "\0337", "\0338"


class StatusLine:
    """Such a line on `stream`, by default stderr, for as long as the context lasts; it leaves no trace.

    The last row is taken out of what the terminal scrolls, so that whatever else is printed meanwhile never meets it.
    It must be entered at the start of a row. Nothing is written where the stream is no terminal, or one that can't do
    it.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._size: os.terminal_size | None = None
        self._shown = -_INTERVAL

    def __enter__(self) -> "StatusLine":
        self._size = _terminal_size(self._stream)
        if self._size is not None:
            # A row more first, for the text may be in the last; setting the margins moves the cursor.
            self._write(f"\n{_SAVE}{_margin(self._size)}{_RESTORE}\033[1A")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._size is not None:
            self._write(f"{_SAVE}\033[r{_RESTORE}\033[J")
            self._size = None

    def show(self, describe: Callable[[], str]) -> None:
        """Write what `describe` says, cut to the width of the terminal; not more often than ten times a second."""
        now = time.monotonic()
        if self._size is None or now - self._shown < _INTERVAL:
            return
        self._shown = now
        size = _terminal_size(self._stream)
        if size is None:
            return
        margin = "" if size == self._size else _margin(size)
        self._size = size
        text = describe()[: size.columns - 1]
        self._write(f"{_SAVE}{margin}\033[{size.lines};1H\033[2m{text}\033[m\033[K{_RESTORE}")

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


def _margin(size: os.terminal_size) -> str:
    return f"\033[1;{size.lines - 1}r"


def _terminal_size(stream: TextIO) -> os.terminal_size | None:
    """None where there is no terminal, or none that knows the escapes."""
    if os.name != "posix" or os.environ.get("TERM", "dumb") == "dumb" or not stream.isatty():
        return None
    size = os.get_terminal_size(stream.fileno())
    return size if size.lines >= _MIN_ROWS and size.columns > 1 else None
