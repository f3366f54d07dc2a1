"""What is measured: a model, and the worker that runs it."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.peers.child_python import run_module
from benchmarks.peers.timed_worker import Workload


@dataclass(frozen=True)
class Case:
    """A row of the results."""

    name: str
    worker: str
    """A module of this package."""
    python: Path
    model: dict[str, Any]
    """What the worker loads."""
    scored: bool = True
    """Whether its perplexity says something."""

    def measure(self, work: Workload) -> dict[str, float]:
        """What `timed_worker.measure` finds, in a process of its own.

        Raises:
            RuntimeError: the worker fails.
        """
        result: dict[str, float] = self._run({"model": self.model, "work": asdict(work)}, work.threads)
        return result

    def losses(self, windows: list[list[int]], threads: int) -> list[float]:
        """The summed cross-entropy of each window of tokens, in nats, in a process of its own.

        Raises:
            RuntimeError: the worker fails.
        """
        request = {"model": self.model, "threads": threads, "windows": windows}
        losses: list[float] = self._run(request, threads)["losses"]
        return losses

    def _run(self, request: dict[str, Any], threads: int) -> dict[str, Any]:
        printed = run_module(
            self.python,
            f"benchmarks.peers.{self.worker}",
            given=json.dumps(request),
            environment={"OMP_NUM_THREADS": str(threads)},
        )
        result: dict[str, Any] = json.loads(printed.strip().splitlines()[-1])
        return result
