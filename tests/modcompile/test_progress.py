import logging
import os
import pty
import re
import sys

import pytest
from transformers.utils import logging as transformers_logging

from modcompile.progress import quiet_transformers, show_elapsed


def test_shows_nothing_for_what_is_done_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    with show_elapsed("tracing"):
        pass
    assert capfd.readouterr() == ("", "")


def test_writes_one_line_to_a_log(monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.pipe()
    with os.fdopen(read) as output:
        with os.fdopen(write, "w") as stderr:
            monkeypatch.setattr(sys, "stderr", stderr)
            with show_elapsed("tracing", delay=0):
                assert output.readline() == "tracing …\n"
        assert output.read() == ""


def test_keeps_the_seconds_up_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = pty.openpty()
    with os.fdopen(ours, "rb", buffering=0) as terminal, os.fdopen(theirs, "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        written = ""
        with show_elapsed("tracing", delay=0):
            while written.count("s") < 2:
                written += terminal.read(100).decode()
        while not written.endswith("\n"):
            written += terminal.read(100).decode()
    assert re.fullmatch(r"(\rtracing … \d+ s){2,}\rtracing: \d+\.\d s\033\[K\r\n", written)


def test_gives_transformers_its_voice_back() -> None:
    before = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()

    @quiet_transformers()
    def fail() -> None:
        assert transformers_logging.get_verbosity() == logging.ERROR
        assert not transformers_logging.is_progress_bar_enabled()
        raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        fail()
    assert (transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()) == before
