import platform
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from modcompile.export import huge_pages as module
from modcompile.export.huge_pages import huge_pages

ROOT = Path(__file__).parents[2]
SIZE = 16 << 20


def grants_huge_pages() -> bool:
    """To who asks, as Linux does since 6.1."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if sys.platform != "linux" or not setting.is_file():
        return False
    version = tuple(map(int, re.findall(r"\d+", platform.release())[:2]))
    return version >= (6, 1) and "[madvise]" in setting.read_text()


def test_leaves_what_the_memory_holds() -> None:
    with huge_pages():
        array = np.arange(SIZE // 8)
    np.testing.assert_array_equal(array, np.arange(SIZE // 8))


def test_an_error_within_passes() -> None:
    with pytest.raises(ValueError, match="of mine"), huge_pages():
        raise ValueError("of mine")


@pytest.mark.parametrize("missing", ["_SETTINGS", "_PAGEMAP", "_MAPS"])
def test_without_what_the_kernel_tells_nothing_happens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    monkeypatch.setattr(module, missing, tmp_path / "none")
    with huge_pages():
        array = np.ones(SIZE // 8)
    assert array.all()


# In a process of its own: that of the tests has threads and arrays of others, which move as well.
_MOVES = """
import mmap, re, sys
from modcompile.export.huge_pages import huge_pages

SIZE, step = 16 << 20, int(sys.argv[1])

def kib(field):
    return int(re.search(rf"{field}:\\s+(\\d+) kB", open("/proc/self/smaps_rollup").read())[1])

def filled():
    memory = mmap.mmap(-1, SIZE, mmap.MAP_PRIVATE)
    for offset in range(0, SIZE, step * mmap.PAGESIZE):
        memory[offset] = 1
    return memory

before = filled()
start = kib("AnonHugePages")
with huge_pages():
    within = filled()
    resident = kib("Rss")
print(kib("AnonHugePages") - start, kib("Rss") - resident)
assert within[:] == before[:]
"""


@pytest.mark.skipif(not grants_huge_pages(), reason="the kernel gives no huge pages, or gives them unasked")
@pytest.mark.parametrize("step", [1, 2])
def test_what_is_filled_within_moves_and_memory_does_not_grow(step: int) -> None:
    """Filled to the last page it moves; with every other page empty it would take twice the memory, and stays."""
    ran = subprocess.run(
        [sys.executable, "-c", _MOVES, str(step)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    moved, grown = map(int, ran.stdout.split())
    assert abs(grown) < 2048
    # Beside it a page or two of the interpreter's own memory may fill up within.
    assert (moved > SIZE // 2048) if step == 1 else (moved < SIZE // 4096)
    assert moved < SIZE // 1024 + 4096  # what was there before stays as it is
