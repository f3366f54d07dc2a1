import errno
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from modcompile.cli import run
from modcompile.errors import ConfigError, DataError, ModcompileError, VerificationError


def _raises(error: BaseException) -> Callable[[], None]:
    def main() -> None:
        raise error

    return main


def test_a_command_that_returns_succeeds(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(lambda: print("done")) == 0
    assert capfd.readouterr() == ("done\n", "")


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ConfigError("--router_start is 9,\nthe model has 3"), 2, "error: --router_start is 9, the model has 3\n"),
        (DataError("no texts"), 2, "error: no texts\n"),
        (VerificationError("the logits differ by 0.5"), 1, "error: the logits differ by 0.5\n"),
    ],
)
def test_an_error_of_ours_is_one_line_and_a_status(
    error: ModcompileError, status: int, line: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(_raises(error)) == status
    assert capfd.readouterr() == ("", line)


def test_a_full_disk_is_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(lambda: print(Path("/dev/full").write_text("x"))) == 2
    stdout, stderr = capfd.readouterr()
    assert stdout == ""
    assert stderr.startswith("error: the disk is full (")
    assert stderr.count("\n") == 1


def test_a_bug_keeps_its_traceback() -> None:
    for bug in (ZeroDivisionError(), OSError(errno.EIO, "a broken disk")):
        with pytest.raises(type(bug)) as raised:
            run(_raises(bug))
        assert raised.value is bug


# A shell that starts the tests in the background has them ignore SIGINT, and what they start inherits that.
_SCRIPT = """
import signal, sys, time
from modcompile.cli import run

signal.signal(signal.SIGINT, signal.default_int_handler)

def main():
    {body}

sys.exit(run(main))
"""


def _script(body: str) -> list[str]:
    return [sys.executable, "-c", _SCRIPT.format(body=body)]


def test_a_full_disk_under_stdout_is_one_line() -> None:
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(_script("print('x')"), stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith("error: the disk is full (")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_cleans_up_and_leaves_no_traceback(number: signal.Signals) -> None:
    body = """
    try:
        print("ready", flush=True)
        while True: time.sleep(0.01)
    finally:
        print("cleaned up")
"""
    with subprocess.Popen(_script(body), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        stdout, stderr = process.communicate()
    assert (process.returncode, stdout, stderr) == (130, "cleaned up\n", "interrupted\n")


def test_a_reader_that_goes_away_is_no_error() -> None:
    command = _script("\n    while True: print('line')")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "line\n"
        process.stdout.close()
        assert process.wait() == 141
        assert process.stderr.read() == ""
