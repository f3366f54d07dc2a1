"""What a user sees while a library works: nothing for two seconds, then that it still does."""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging as transformers_logging

_INTERVAL = 0.5  # seconds

_free = threading.Lock()


@contextmanager
def show_elapsed(description: str, *, delay: float = 2.0) -> Iterator[None]:
    """`description` with the seconds so far on stderr, from `delay` seconds on; on a terminal they are kept up.

    A thread of its own writes it: the calls this is for (a trace, a parser) have no steps to report. Within another
    call of this kind nothing is written, so that two lines never fight for one place.
    """
    if not _free.acquire(blocking=False):
        yield
        return
    done = threading.Event()
    thread = threading.Thread(target=_write_elapsed, args=(description, delay, done), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        _free.release()


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without the progress bars of transformers, and without its warnings.

    For calls that take no time and whose outcome is checked: errors still pass.
    """
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def _write_elapsed(description: str, delay: float, done: threading.Event) -> None:
    start = time.monotonic()
    if done.wait(delay):
        return
    stream = sys.stderr
    if not stream.isatty():
        print(f"{description} …", file=stream, flush=True)
        return
    while not done.wait(_INTERVAL):
        stream.write(f"\r{description} … {time.monotonic() - start:.0f} s")
        stream.flush()
    stream.write(f"\r{description}: {time.monotonic() - start:.1f} s\033[K\n")
    stream.flush()
