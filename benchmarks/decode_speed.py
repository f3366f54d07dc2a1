"""Prefill and decode times of ONNX Runtime sessions, taken in turn so that a noisy machine is noisy for all alike."""

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import perf_counter

import numpy as np

from modcompile.export.session import RoutedSession


@dataclass(frozen=True)
class Speed:
    """Seconds of each repeat: one prefill, and the median of its decode steps."""

    prefill: tuple[float, ...]
    decode: tuple[float, ...]

    @property
    def decode_ms(self) -> float:
        """Median over repeats, in milliseconds a token."""
        return statistics.median(self.decode) * 1e3

    @property
    def prefill_ms(self) -> float:
        """Median over repeats, in milliseconds a prompt."""
        return statistics.median(self.prefill) * 1e3

    @property
    def decode_spread(self) -> float:
        """(largest - smallest) / median of the repeats."""
        return (max(self.decode) - min(self.decode)) / statistics.median(self.decode)


def time_decode(session: RoutedSession, prompt: np.ndarray, new_tokens: int) -> tuple[float, float]:
    """Seconds of the prefill of `prompt [1, T]`, and the median seconds of `new_tokens` greedy steps."""
    cache = session.empty_cache(1)
    ids, past, times = prompt, 0, []
    for _ in range(new_tokens + 1):
        total = past + ids.shape[1]
        mask = np.ones((1, total), np.int64)
        start = perf_counter()
        logits, cache, _ = session.run(ids, mask, np.arange(past, total)[None], cache)
        times.append(perf_counter() - start)
        past, ids = total, logits[:, -1:].argmax(-1)
    return times[0], statistics.median(times[1:])


def compare(
    cases: Mapping[str, Callable[[], RoutedSession]], prompt: np.ndarray, new_tokens: int, repeats: int
) -> dict[str, Speed]:
    """Each case `repeats` times, in turn; every case gives the session to run, set to its thresholds."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
    for repeat in range(repeats + 1):
        for name, session in cases.items():
            measured = time_decode(session(), prompt, new_tokens)
            if repeat:  # the first round warms up
                times[name].append(measured)
    return {
        name: Speed(tuple(prefill for prefill, _ in taken), tuple(decode for _, decode in taken))
        for name, taken in times.items()
    }
