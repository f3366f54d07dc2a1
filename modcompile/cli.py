"""What the command lines share: how they end."""

import gc
import os
import signal
import sys
from collections.abc import Callable

from modcompile.disk_errors import disk_full_reason
from modcompile.errors import ModcompileError, VerificationError

_BAD_INPUT = 2
_NOT_VERIFIED = 1
_INTERRUPTED = 130  # what shells make of SIGINT
_BROKEN_PIPE = 141  # and of SIGPIPE
_NEW_OBJECTS = 100_000  # from how many on they are searched for garbage


def run(main: Callable[[], None]) -> int:
    """Run a command and return its exit status.

    An error that a user can act on, a full disk and an interrupt (Ctrl-C, or a polite kill) end in one line on stderr;
    a reader that went away ends in none. Any other exception passes: it is a bug, and its traceback is wanted.
    """
    terminate = signal.signal(signal.SIGTERM, signal.default_int_handler)
    # What the libraries have made stays till the end; to search it for garbage again and again takes seconds, and so
    # does searching the graphs that passes make whenever there are 700 new objects. A process that runs several
    # commands does it once: what is frozen is never freed.
    if not gc.get_freeze_count():
        gc.freeze()
    threshold = gc.get_threshold()
    gc.set_threshold(_NEW_OBJECTS, *threshold[1:])
    try:
        main()
        sys.stdout.flush()
    except ModcompileError as error:
        _complain(f"error: {error}")
        return _NOT_VERIFIED if isinstance(error, VerificationError) else _BAD_INPUT
    except KeyboardInterrupt:
        _complain("interrupted")
        return _INTERRUPTED
    except BrokenPipeError:
        _flush_or_discard_stdout()
        return _BROKEN_PIPE
    except Exception as error:
        reason = disk_full_reason(error)
        if reason is None:
            raise
        _flush_or_discard_stdout()
        _complain(f"error: {reason} ({error}); make room, or choose another --output_dir")
        return _BAD_INPUT
    finally:
        gc.set_threshold(*threshold)
        signal.signal(signal.SIGTERM, terminate)
    return 0


def _complain(line: str) -> None:
    print(" ".join(line.split()), file=sys.stderr)


def _flush_or_discard_stdout() -> None:
    """Leave nothing in the buffer that Python would fail to write, with a message of its own, at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
