import fcntl
import io
import os
import pty
import struct
import termios
from collections.abc import Iterator
from typing import TextIO

import pytest

from modcompile import status_line
from modcompile.status_line import StatusLine
from tests.terminal_screen import TerminalScreen

ROWS, COLUMNS = 6, 30


class Terminal:
    """A terminal of the system, and what it shows."""

    def __init__(self) -> None:
        self._master, slave = pty.openpty()
        self.stream: TextIO = os.fdopen(slave, "w")
        self.screen = TerminalScreen(ROWS, COLUMNS)
        self.resize(ROWS, COLUMNS)

    def resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self.stream, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def print(self, text: str) -> None:
        self.stream.write(text)
        self.stream.flush()

    def written(self) -> str:
        """All since the last call; it arrives in pieces, so a mark tells where it ends."""
        self.print("\0")
        text = ""
        while not text.endswith("\0"):
            text += os.read(self._master, 65536).decode()
        return text[:-1]

    def shown(self) -> list[str]:
        self.screen.write(self.written())
        return self.screen.rows

    def close(self) -> None:
        self.stream.close()
        os.close(self._master)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    """Where every call to `show` comes long enough after the one before."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(status_line, "_INTERVAL", 0.0)
    terminal = Terminal()
    yield terminal
    terminal.close()


@pytest.mark.parametrize("above", range(ROWS + 2))
@pytest.mark.parametrize("lines", [1, 3, 8])
def test_text_scrolls_above_the_line_which_leaves_no_trace(terminal: Terminal, above: int, lines: int) -> None:
    terminal.print("".join(f"before {index}\n" for index in range(above)))
    expected = [f"before {index}" for index in range(above)]
    with StatusLine(terminal.stream) as status:
        for line in range(lines):
            terminal.print(f"text {line} ")
            status.show(f"at {line}".format)
            terminal.print("goes on\n")
            status.show(f"after {line}".format)
            expected.append(f"text {line} goes on")
            *text, last = terminal.shown()
            assert last == f"after {line}"
            assert "\n".join(text).strip() == "\n".join(expected[-(ROWS - 2) :])
    terminal.print("done\n")
    shown = [row for row in terminal.shown() if row]
    assert shown == [*expected, "done"][-len(shown) :]
    assert len(shown) >= min(len(expected) + 1, ROWS - 2)


def test_the_line_is_cut_to_the_width(terminal: Terminal) -> None:
    with StatusLine(terminal.stream) as status:
        status.show(lambda: "x" * 100)
        assert terminal.shown()[-1] == "x" * (COLUMNS - 1)
        status.show(lambda: "short")
        assert terminal.shown()[-1] == "short"


def test_the_terminal_may_become_larger(terminal: Terminal) -> None:
    with StatusLine(terminal.stream) as status:
        terminal.print("text")
        status.show(lambda: "small")
        terminal.shown()
        terminal.resize(ROWS + 4, COLUMNS)
        terminal.screen.rows += [""] * 4
        status.show(lambda: "large")
        terminal.print(" goes on")
        shown = terminal.shown()
        assert (shown[0], shown[-1]) == ("text goes on", "large")


def test_is_undone_after_an_error(terminal: Terminal) -> None:
    def fail() -> None:
        with StatusLine(terminal.stream) as status:
            terminal.print("text")
            status.show(lambda: "going")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    terminal.print("\nmore" * 9)
    assert terminal.shown() == ["more"] * ROWS


def test_is_not_written_more_often_than_anyone_reads(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status_line, "_INTERVAL", 3600.0)
    with StatusLine(terminal.stream) as status:
        status.show(lambda: "first")
        status.show(lambda: pytest.fail("nobody would see it"))
        assert terminal.shown()[-1] == "first"


@pytest.mark.parametrize("case", ["no terminal", "dumb", "no TERM", "low"])
def test_elsewhere_nothing_is_written(terminal: Terminal, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    if case == "no TERM":
        monkeypatch.delenv("TERM")
    elif case == "dumb":
        monkeypatch.setenv("TERM", "dumb")
    elif case == "low":
        terminal.resize(2, COLUMNS)
    stream = io.StringIO() if case == "no terminal" else terminal.stream
    with StatusLine(stream) as status:
        status.show(lambda: pytest.fail("nobody would see it"))
    assert terminal.written() == ""
    assert not isinstance(stream, io.StringIO) or stream.getvalue() == ""
