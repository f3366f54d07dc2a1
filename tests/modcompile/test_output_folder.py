import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from modcompile.errors import DataError, OutputError
from modcompile.output_folder import check_writable_target, staged_folder


def _has_marker(folder: Path) -> bool:
    return (folder / "marker").exists()


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    """A folder made by us, alone in its parent."""
    folder = tmp_path / "parent" / "ours"
    folder.mkdir(parents=True)
    (folder / "marker").write_text("old")
    return folder


def test_makes_a_folder_and_its_parents(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b"
    with staged_folder(target, overwrite=False, is_ours=_has_marker) as staging:
        assert staging.parent == target.parent
        assert staging.name.startswith(".b.partial-")
        (staging / "inner").mkdir()
        (staging / "inner" / "file").write_text("new")
        assert not target.exists()
    assert (target / "inner" / "file").read_text() == "new"
    assert _names(target.parent) == ["b"]


def test_replaces_a_folder_of_ours_as_a_whole(ours: Path) -> None:
    (ours / "stale").touch()
    with staged_folder(ours, overwrite=False, is_ours=_has_marker) as staging:
        (staging / "marker").write_text("new")
        assert _names(ours) == ["marker", "stale"]
    assert _names(ours) == ["marker"]
    assert (ours / "marker").read_text() == "new"
    assert _names(ours.parent) == ["ours"]


def test_replaces_a_folder_of_others_only_when_told_to(tmp_path: Path) -> None:
    target = tmp_path / "theirs"
    target.mkdir()
    (target / "thesis.tex").touch()
    message = (
        r"theirs exists and was not made by modcompile; choose another --output_dir or pass --overwrite_output_dir"
    )
    with pytest.raises(OutputError, match=message):
        check_writable_target(target, overwrite=False, is_ours=_has_marker)
    with pytest.raises(OutputError, match=message), staged_folder(target, overwrite=False, is_ours=_has_marker):
        pytest.fail("the block ran")
    assert _names(target) == ["thesis.tex"]
    with staged_folder(target, overwrite=True, is_ours=_has_marker) as staging:
        (staging / "marker").touch()
    assert _names(target) == ["marker"]


def test_takes_an_empty_folder(tmp_path: Path) -> None:
    target = tmp_path / "empty"
    target.mkdir()
    with staged_folder(target, overwrite=False, is_ours=_has_marker) as staging:
        (staging / "marker").touch()
    assert _names(target) == ["marker"]


def test_refuses_what_was_put_there_in_the_meantime(tmp_path: Path) -> None:
    target = tmp_path / "out"

    @staged_folder(target, overwrite=False, is_ours=_has_marker)
    def interfere() -> None:
        target.mkdir()
        (target / "thesis.tex").touch()

    with pytest.raises(OutputError, match="was not made by modcompile"):
        interfere()
    assert _names(tmp_path) == ["out"]
    assert _names(target) == ["thesis.tex"]


def test_replaces_the_folder_that_a_link_leads_to(ours: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(ours)
    with staged_folder(link, overwrite=False, is_ours=_has_marker) as staging:
        (staging / "marker").write_text("new")
    assert link.is_symlink()
    assert (ours / "marker").read_text() == "new"


def _write_half_and_raise(target: Path, error: BaseException) -> None:
    with staged_folder(target, overwrite=False, is_ours=_has_marker) as staging:
        (staging / "marker").write_text("half")
        raise error


@pytest.mark.parametrize("error", [DataError("no texts"), KeyboardInterrupt(), ZeroDivisionError()])
def test_an_error_leaves_what_was_there(ours: Path, error: BaseException) -> None:
    for target in (ours, ours.with_name("new")):
        with pytest.raises(type(error)) as raised:
            _write_half_and_raise(target, error)
        assert raised.value is error
        assert _names(ours.parent) == ["ours"]
        assert (ours / "marker").read_text() == "old"


def test_a_move_that_fails_puts_the_old_folder_back(ours: Path) -> None:
    staged: list[Path] = []

    def is_ours(folder: Path) -> bool:
        for staging in staged:  # The second time it is asked, just before the move.
            shutil.rmtree(staging)
        return True

    with (
        pytest.raises(OutputError, match=r"ours can't be written \(No such file"),
        staged_folder(ours, overwrite=False, is_ours=is_ours) as staging,
    ):
        staged.append(staging)
    assert (ours / "marker").read_text() == "old"
    assert _names(ours.parent) == ["ours"]


# A shell that starts the tests in the background has them ignore SIGINT, and what they start inherits that.
_SCRIPT = """
import os, signal, sys, time
from pathlib import Path
from modcompile.output_folder import staged_folder

signal.signal(signal.SIGINT, signal.default_int_handler)
{prelude}
with staged_folder(sys.argv[1], overwrite=False, is_ours=lambda folder: True) as staging:
    (staging / "marker").write_text("half")
    {body}
"""
_WAIT = """
    print("ready", flush=True)
    while True: time.sleep(0.01)
"""


def _start(target: Path, body: str, prelude: str = "") -> "subprocess.Popen[str]":
    script = _SCRIPT.format(body=body, prelude=prelude)
    return subprocess.Popen(
        [sys.executable, "-c", script, str(target)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_process_leaves_what_was_there(ours: Path, number: signal.Signals) -> None:
    with _start(ours, _WAIT) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        assert _names(ours.parent) == [f".ours.partial-{process.pid}", "ours"]
        process.send_signal(number)
    assert (ours / "marker").read_text() == "old"
    left = [f".ours.partial-{process.pid}"] if number == signal.SIGKILL else []
    assert _names(ours.parent) == [*left, "ours"]
    # The next write to the same place removes what a killed one left.
    with staged_folder(ours, overwrite=False, is_ours=_has_marker) as staging:
        (staging / "marker").write_text("new")
    assert _names(ours.parent) == ["ours"]
    assert (ours / "marker").read_text() == "new"


def test_the_next_write_undoes_a_move_that_a_kill_cut_in_two(ours: Path) -> None:
    prelude = """
rename = Path.rename
def rename_and_die(self, target):
    rename(self, target)
    os.kill(os.getpid(), signal.SIGKILL)
Path.rename = rename_and_die
"""
    with _start(ours, "", prelude) as process:
        pass
    assert _names(ours.parent) == [f".ours.partial-{process.pid}", f".ours.replaced-{process.pid}"]
    with pytest.raises(DataError), staged_folder(ours, overwrite=False, is_ours=_has_marker):
        raise DataError("no texts")
    assert _names(ours.parent) == ["ours"]
    assert (ours / "marker").read_text() == "old"


def test_leaves_alone_what_another_process_is_writing(ours: Path) -> None:
    with _start(ours, _WAIT) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        with staged_folder(ours, overwrite=False, is_ours=_has_marker) as staging:
            (staging / "marker").write_text("new")
        assert _names(ours.parent) == [f".ours.partial-{process.pid}", "ours"]
        process.kill()


@contextmanager
def _files_no_larger_than(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


_WRITERS: dict[str, Callable[[Path], object]] = {
    "python": lambda folder: (folder / "weights").write_bytes(bytes(800_000)),
    "safetensors": lambda folder: save_file({"weights": torch.zeros(200_000)}, folder / "model.safetensors"),
    "torch": lambda folder: torch.save(torch.zeros(200_000), folder / "weights.pt"),
}


@pytest.mark.parametrize("writer", ["python", "safetensors"])
def test_a_file_that_does_not_fit_is_one_line_and_leaves_nothing(ours: Path, writer: str) -> None:
    with (
        _files_no_larger_than(100_000),
        pytest.raises(OutputError, match=r"ours can't be written: the file would be larger than allowed; make room"),
        staged_folder(ours, overwrite=False, is_ours=_has_marker) as staging,
    ):
        _WRITERS[writer](staging)
    assert _names(ours.parent) == ["ours"]
    assert (ours / "marker").read_text() == "old"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("needs the right to mount a file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("writer", _WRITERS)
def test_a_full_disk_is_one_line_and_leaves_nothing(small_disk: Path, writer: str) -> None:
    with (
        pytest.raises(OutputError, match="out can't be written: the disk is full; make room"),
        staged_folder(small_disk / "out", overwrite=False, is_ours=_has_marker) as staging,
    ):
        _WRITERS[writer](staging)
    assert _names(small_disk) == []


def _refusal(path: str | Path) -> str:
    """Why `path` is not written to, even when told to overwrite."""
    with pytest.raises(OutputError) as error:
        check_writable_target(path, overwrite=True, is_ours=lambda folder: True)
    with pytest.raises(OutputError), staged_folder(path, overwrite=True, is_ours=lambda folder: True):
        pytest.fail("the block ran")
    return str(error.value)


def test_never_replaces_the_current_folder_or_one_above_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    current = tmp_path / "a" / "b"
    current.mkdir(parents=True)
    monkeypatch.chdir(current)
    for path in (".", current, "..", tmp_path, "/", ""):
        assert "is or holds the current folder" in _refusal(path)
    assert current.exists()


def test_never_replaces_the_home_folder_or_one_above_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "homes" / "me"
    home.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    for path in ("~", home, home.parent):
        assert "is or holds the home folder" in _refusal(path)
    assert check_writable_target("~/out", overwrite=False, is_ours=_has_marker) == home / "out"


def test_never_replaces_a_mount_point() -> None:
    assert "/proc is a mount point" in _refusal("/proc")


def test_never_replaces_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    assert "file is a file; choose another --output_dir" in _refusal(tmp_path / "file")
    assert "file is a file, so" in _refusal(tmp_path / "file" / "out")
    assert (tmp_path / "file").read_text() == "text"


def test_says_that_a_folder_cannot_be_made() -> None:
    with pytest.raises(OutputError, match="/proc"), staged_folder("/proc/out", overwrite=False, is_ours=_has_marker):
        pytest.fail("the block ran")


def test_a_check_leaves_no_trace(tmp_path: Path) -> None:
    target = check_writable_target(tmp_path / "a" / "b", overwrite=False, is_ours=_has_marker)
    assert target == tmp_path / "a" / "b"
    assert _names(tmp_path) == []
