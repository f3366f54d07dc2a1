"""The worker of our own exports, in modcompile's session."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.timed_worker import Engine, Logits, serve
from modcompile.export.session import MODEL_FILE, RoutedSession


class _Session:
    """A growing cache; logits are computed for every token of a prompt."""

    def __init__(self, folder: Path, thresholds: Sequence[float] | None, threads: int) -> None:
        self._session = RoutedSession(
            folder / MODEL_FILE, thresholds=thresholds, num_threads=threads, providers=["CPUExecutionProvider"]
        )
        self.start(0)

    def start(self, capacity: int) -> None:
        self._cache, self._length = self._session.empty_cache(1), 0

    def prefill(self, ids: Sequence[int]) -> int:
        return int(self._run(ids)[-1].argmax())

    def step(self, token: int) -> int:
        return self.prefill([token])

    def logits(self, ids: Sequence[int]) -> Logits:
        self.start(len(ids))
        return self._run(ids)

    def _run(self, ids: Sequence[int]) -> Logits:
        total = self._length + len(ids)
        positions = np.arange(self._length, total)[None]
        mask = np.ones((1, total), np.int64)
        logits, self._cache, _ = self._session.run(np.array([ids]), mask, positions, self._cache)
        self._length = total
        rows: Logits = logits[0]
        return rows


def load(model: dict[str, Any], threads: int) -> Engine:
    """A session of an exported `folder`, at `thresholds` (None: as exported)."""
    return _Session(Path(model["folder"]), model["thresholds"], threads)


if __name__ == "__main__":
    serve(load)
