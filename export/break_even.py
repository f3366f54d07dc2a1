"""How often a gate must skip to be worth what it costs, measured on the machine at hand."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import numpy as np

from modcompile.export.decoder import Decoder
from modcompile.export.session import RoutedSession

_ROUNDS, _STEPS, _UNTIMED = 3, 12, 3
_OPEN, _SKIPPING = 0.0, 2.0  # thresholds


@dataclass(frozen=True)
class BreakEven:
    """Milliseconds of a decode step, for a batch of one row: with every gate open, with every one closed, without any.

    A larger batch skips a block only where no row needs it, and gains less.
    """

    open_ms: float
    skipping_ms: float
    dense_ms: float

    @property
    def skip_rate(self) -> float:
        """The share of steps that the average gate must skip, in [0, 1]; 1 where skipping gains nothing."""
        gained = self.open_ms - self.skipping_ms
        return min(1.0, max(0.0, self.open_ms - self.dense_ms) / gained) if gained > 0 else 1.0


def measure_break_even(gated: Path, dense: Path, prompt: Sequence[int]) -> BreakEven:
    """Decode after a prompt with two artifacts, that differ in nothing but that `dense` has no gates.

    With as many threads as at run time. One session at a time, since the threads of another that wait would slow it
    down; each anew in every round, since where its weights come to lie in memory makes it some percent faster or slower
    for as long as it is loaded.

    Raises:
        ArtifactError: ONNX Runtime can't load or run them.
    """
    times: dict[float | None, list[float]] = {_OPEN: [], _SKIPPING: [], None: []}
    for _ in range(_ROUNDS):
        for model_file, thresholds in ((gated, (_OPEN, _SKIPPING)), (dense, (None,))):
            session = RoutedSession(model_file)
            for threshold in thresholds:
                session.thresholds = threshold
                times[threshold].append(_step_ms(session, prompt))
            del session  # before the next is loaded
    return BreakEven(*(statistics.median(taken) for taken in times.values()))


def _step_ms(session: RoutedSession, prompt: Sequence[int]) -> float:
    decoder = Decoder(session, 1, capacity=len(prompt) + _UNTIMED + _STEPS)
    decoder.step(np.array([prompt]))
    token = np.array([prompt[-1:]])
    times = []
    for _ in range(_UNTIMED + _STEPS):
        start = perf_counter()
        decoder.step(token)
        times.append((perf_counter() - start) * 1e3)
    return statistics.median(times[_UNTIMED:])
