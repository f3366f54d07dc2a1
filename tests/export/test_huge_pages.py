import mmap
import platform
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from modcompile.export import huge_pages as module
from modcompile.export.huge_pages import huge_pages

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


def kib(field: str) -> int:
    told = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/smaps_rollup").read_text())
    assert told is not None
    return int(told[1])


def filled() -> mmap.mmap:
    memory = mmap.mmap(-1, SIZE, mmap.MAP_PRIVATE)
    memory.write(b"a" * SIZE)
    return memory


def half_empty() -> mmap.mmap:
    memory = mmap.mmap(-1, SIZE, mmap.MAP_PRIVATE)
    for offset in range(0, SIZE, 2 * mmap.PAGESIZE):
        memory[offset] = 1
    return memory


@pytest.mark.skipif(not grants_huge_pages(), reason="the kernel gives no huge pages, or gives them unasked")
@pytest.mark.parametrize(("fill", "moves"), [(filled, True), (half_empty, False)])
def test_what_is_filled_within_moves_and_memory_does_not_grow(fill: Callable[[], mmap.mmap], *, moves: bool) -> None:
    before = fill()
    start = kib("AnonHugePages")
    with huge_pages():
        within = fill()
        resident = kib("Rss")
    assert abs(kib("Rss") - resident) < 2048
    moved = kib("AnonHugePages") - start
    # Beside it a page or two of the interpreter's own memory may fill up within.
    assert (moved > SIZE // 2048) if moves else (moved < SIZE // 4096)
    assert moved < SIZE // 1024 + 4096  # what was there before stays as it is
    assert within[:] == before[:]
