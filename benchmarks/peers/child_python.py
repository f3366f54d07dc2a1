"""Run modules in processes of their own, in this environment or in another."""

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

_ROOT = Path(__file__).parents[2]


def run_module(
    python: Path, module: str, arguments: Sequence[str] = (), *, given: str = "", environment: Mapping[str, str] = {}
) -> str:
    """`python -m module` in the root of the repository, with `given` as its input; returns what it prints.

    Raises:
        RuntimeError: it fails; the message ends with the last line of what it wrote to stderr.
    """
    done = subprocess.run(
        [python, "-m", module, *arguments],
        input=given,
        capture_output=True,
        text=True,
        check=False,
        cwd=_ROOT,
        env=os.environ | environment,
    )
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["it wrote no reason"])[-1]
        raise RuntimeError(f"{python} -m {module} ended with {done.returncode}: {reason}")
    return done.stdout
