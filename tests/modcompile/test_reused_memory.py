import subprocess
import sys

import pytest

_FAULTS = """
import resource, sys
import torch
from modcompile.reused_memory import reuse_freed_memory

def faulted():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt * resource.getpagesize()

def compute():
    first = torch.ones(4, 1 << 22)
    return float((first + first * 2).exp().sum())

if sys.argv[1] == "reused":
    reuse_freed_memory()
for _ in range(4):
    compute()
before = faulted()
for _ in range(4):
    compute()
print((faulted() - before) / (4 * 4 * (4 << 22)))
"""


def _faulted(how: str) -> float:
    """How often the system hands out the memory of a tensor, once as much has been freed before."""
    command = [sys.executable, "-c", _FAULTS, how]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="asks glibc")
def test_memory_of_freed_tensors_is_used_again() -> None:
    assert _faulted("reused") < 0.1
    assert _faulted("given back") > 2  # of four tensors at a time, or the test above would show nothing
