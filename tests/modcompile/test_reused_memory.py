import subprocess
import sys

import pytest

_FAULTS = """
import resource, sys
import torch
from modcompile.reused_memory import reuse_freed_memory

def faulted():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt * resource.getpagesize()

rounds, size = 24, 40 << 20  # glibc never keeps blocks of more than 32 MB by itself

def compute():
    first = torch.ones(size // 4)
    return float((first + first * 2).exp().sum())

if sys.argv[1] == "reused":
    reuse_freed_memory()
before = faulted()
for _ in range(rounds):
    compute()
print((faulted() - before) / size / rounds)
"""


def _faulted(how: str) -> float:
    """Of how many tensors the system hands out the memory, in the mean of 24 times that four are computed."""
    command = [sys.executable, "-c", _FAULTS, how]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="asks glibc")
def test_memory_of_freed_tensors_is_used_again() -> None:
    # That of the first four is new, and of some more: small blocks that come to lie between can make a gap too small.
    assert _faulted("reused") < 1
    assert _faulted("given back") > 2  # or the line above would show nothing
