"""Memory that a process keeps, to use it again."""

import ctypes
import sys

# Of glibc's malloc.h; mallopt(3) tells what they do.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
_NEVER = -1
_PAD = 64 << 20


def reuse_freed_memory() -> None:
    """Let this process keep the memory of tensors that are freed, for the next ones; where there is no glibc, nothing.

    glibc gives large blocks back at once, and the system zeroes every page of them when they are asked for again: a
    third of a training step's time went into that, as the logits of a batch alone take hundreds of MB. It is for
    commands that compute tensors of the same sizes again and again; what they held at most, they hold until they end.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:  # musl has none
        return
    for setting, value in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, _NEVER), (_TOP_PAD, _PAD)):
        mallopt(setting, value)
