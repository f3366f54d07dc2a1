"""`python -m modcompile.train` as a user has it: in seconds, killed, or wrong."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from modcompile.cli import run
from modcompile.train import main

# Up to the first checkpoint; then the process ends as a machine that loses its power.
_DIES_AT_ITS_FIRST_CHECKPOINT = """
import os, signal, sys
from modcompile.train import main
from modcompile.trainer import RouterTrainer

save_checkpoint = RouterTrainer._save_checkpoint

def save_and_die(self, *args):
    save_checkpoint(self, *args)
    os.kill(os.getpid(), signal.SIGKILL)

RouterTrainer._save_checkpoint = save_and_die
main(sys.argv[1:])
"""


def fast_flags(train_file: Path) -> list[str]:
    """Flags of a training of seconds."""
    return [
        *("--train_file", str(train_file), "--sequence_length", "16", "--per_device_train_batch_size", "2"),
        *("--max_train_steps", "2", "--logging_steps", "1", "--save_strategy", "no", "--max_eval_samples", "2"),
    ]


def error_of(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What the command says before it exits with status 2; progress of what takes seconds set aside."""
    assert run(lambda: main(argv)) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.endswith("…")]
    assert len(lines) == 1
    return lines[0]


def train_until_killed(argv: list[str]) -> None:
    """Run the command in a process of its own, which is killed once its first checkpoint is written."""
    result = subprocess.run(
        [sys.executable, "-c", _DIES_AT_ITS_FIRST_CHECKPOINT, *argv],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        check=False,
    )
    assert result.returncode == -signal.SIGKILL, result.stderr.decode()
