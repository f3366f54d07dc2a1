"""The worker of our own exports, in modcompile's decoder."""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.timed_worker import Engine, Logits, serve
from modcompile.export.decoder import Decoder
from modcompile.export.huge_pages import huge_pages
from modcompile.export.session import MODEL_FILE, RoutedSession


class _Decoding:
    """One buffer of the sequence's capacity where the export may be run so."""

    def __init__(self, session: RoutedSession) -> None:
        self._session = session
        self.start(1)

    def start(self, capacity: int) -> None:
        self._decoder = Decoder(self._session, 1, capacity)

    def prefill(self, ids: Sequence[int]) -> int:
        logits, _ = self._decoder.step(np.array([ids]))
        return int(logits[0, -1].argmax())

    def step(self, token: int) -> int:
        return self.prefill([token])

    def logits(self, ids: Sequence[int]) -> Logits:
        self.start(len(ids))
        logits, _ = self._decoder.step(np.array([ids]), logits_to_keep=len(ids))
        rows: Logits = logits[0]
        return rows


def load(model: dict[str, Any], threads: int) -> Engine:
    """An exported `folder` at `thresholds` (None: as exported), with `huge_pages` or not."""
    with huge_pages() if model["huge_pages"] else nullcontext():
        session = RoutedSession(
            Path(model["folder"]) / MODEL_FILE,
            thresholds=model["thresholds"],
            num_threads=threads,
            providers=["CPUExecutionProvider"],
        )
        decoding = _Decoding(session)
        decoding.prefill([0])  # A session's first run allocates.
    return decoding


if __name__ == "__main__":
    serve(load)
