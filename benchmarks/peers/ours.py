"""The worker of our own exports, in modcompile's session."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.timed_worker import Engine, Logits, serve
from modcompile.export.decoder import Decoder
from modcompile.export.huge_pages import huge_pages
from modcompile.export.session import MODEL_FILE, RoutedSession


class _Session:
    """As `modcompile.generate --runtime onnx` runs it: the logits of a prompt's last token only."""

    def __init__(self, folder: Path, thresholds: Sequence[float] | None, threads: int) -> None:
        with huge_pages():
            self._session = RoutedSession(
                folder / MODEL_FILE, thresholds=thresholds, num_threads=threads, providers=["CPUExecutionProvider"]
            )
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
    """A session of an exported `folder`, at `thresholds` (None: as exported)."""
    return _Session(Path(model["folder"]), model["thresholds"], threads)


if __name__ == "__main__":
    serve(load)
