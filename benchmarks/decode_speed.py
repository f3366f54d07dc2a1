"""Prefill and decode times of ONNX Runtime sessions, taken in turn so that a noisy machine is noisy for all alike.

Each session has a process of its own, anew in every round. The waiting threads of a second session in one process cost
the first up to a quarter of its speed, and where its weights come to lie in memory makes the same model up to 3 %
faster or slower, for as long as it is loaded.
"""

import resource
import statistics
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter

import numpy as np

from modcompile.export.session import RoutedSession


@dataclass(frozen=True)
class Speed:
    """Seconds of each repeat: one prefill, and the median of its decode steps; and the memory of each process."""

    prefill: tuple[float, ...]
    decode: tuple[float, ...]
    resident_mib: float
    """Median over processes, after their last step."""

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
        """Range of the middle half of the repeats, relative to their median."""
        lower, median, upper = statistics.quantiles(self.decode, n=4)
        return (upper - lower) / median

    def decode_against(self, other: "Speed") -> tuple[float, float, float]:
        """Quartiles of the ratio of decode times, this to the other, each pair of one repeat: lower, median, upper."""
        ratios = [mine / theirs for mine, theirs in zip(self.decode, other.decode, strict=True)]
        lower, median, upper = statistics.quantiles(ratios, n=4)
        return lower, median, upper


@dataclass(frozen=True)
class Case:
    """A model, and the thresholds or the precision bias that it runs at."""

    model_file: Path
    thresholds: Sequence[float] | None = None
    precision_bias: Sequence[float] | None = None


def time_case(
    case: Case, prompt: np.ndarray, new_tokens: int, threads: int, repeats: int
) -> tuple[list[tuple[float, float]], float]:
    """`time_decode` of each repeat, after one to warm up, and then the MiB that the process holds in memory."""
    session = RoutedSession(
        case.model_file, thresholds=case.thresholds, num_threads=threads, providers=["CPUExecutionProvider"]
    )
    session.set_precision_bias(case.precision_bias)
    times = [time_decode(session, prompt, new_tokens) for _ in range(repeats + 1)][1:]
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return times, pages * resource.getpagesize() / 2**20


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
    cases: Mapping[str, Case], prompt: np.ndarray, new_tokens: int, *, threads: int, rounds: int, repeats: int
) -> dict[str, Speed]:
    """Time the cases in turn, `rounds` times; each time in a process of its own, for `repeats` times there."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
    resident: dict[str, list[float]] = {name: [] for name in cases}
    processes = ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1)
    with processes:
        for number in range(rounds):
            for name in list(cases)[:: 1 if number % 2 else -1]:
                task = processes.submit(time_case, cases[name], prompt, new_tokens, threads, repeats)
                taken, held = task.result()
                times[name].extend(taken)
                resident[name].append(held)
    return {
        name: Speed(
            tuple(prefill for prefill, _ in taken),
            tuple(decode for _, decode in taken),
            statistics.median(resident[name]),
        )
        for name, taken in times.items()
    }
