"""Decode steps of several models side by side, for differences of less than a percent.

The sessions of one process step in turn, in a new order each time, and what is compared are steps that follow each
other: what disturbs the machine disturbs all alike. What stays for as long as a model is loaded, as where its weights
come to lie in memory, differs from process to process, so there are several. With one thread a session has no others
that wait, and slow down the next one's.
"""

import random
import statistics
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter

import numpy as np

from modcompile.export.decoder import Decoder
from modcompile.export.huge_pages import huge_pages
from modcompile.export.session import RoutedSession

_UNTIMED = 3


@dataclass(frozen=True)
class Neighbours:
    """Of each process: the median milliseconds of a model's steps, and the median ratio to its neighbours'."""

    milliseconds: tuple[float, ...]
    ratios: tuple[float, ...]

    def quartiles(self) -> tuple[float, float, float]:
        """Of the ratios: lower, median, upper."""
        lower, median, upper = statistics.quantiles(self.ratios, n=4)
        return lower, median, upper


def compare_steps(
    models: Mapping[str, Path], prompt_tokens: int, steps: int, *, threads: int, processes: int
) -> dict[str, Neighbours]:
    """Each model against the first, gates open."""
    times: list[list[tuple[float, float]]] = []
    pool = ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1)
    with pool:
        for number in range(processes):
            task = pool.submit(step_in_turn, list(models.values()), prompt_tokens, steps, threads, number)
            times.append(task.result())
    return {
        name: Neighbours(*(tuple(values) for values in zip(*taken, strict=True)))
        for name, taken in zip(models, zip(*times, strict=True), strict=True)
    }


def step_in_turn(
    model_files: list[Path], prompt_tokens: int, steps: int, threads: int, seed: int
) -> list[tuple[float, float]]:
    """Median milliseconds of each model's greedy steps after random tokens, and their median ratio to the first's."""
    order = list(range(len(model_files)))
    shuffled = random.Random(seed)
    shuffled.shuffle(order)
    sessions: dict[int, RoutedSession] = {}
    with huge_pages():
        for index in order:
            session = RoutedSession(model_files[index], num_threads=threads, providers=["CPUExecutionProvider"])
            if session.num_thresholds:
                session.thresholds = 0.0
            sessions[index] = session
        decoders = {index: Decoder(session, 1, prompt_tokens + steps) for index, session in sessions.items()}
        prompt = np.random.default_rng(0).integers(0, 100, (1, prompt_tokens))
        ids = {index: _next(decoder, prompt) for index, decoder in decoders.items()}
    times: dict[int, list[float]] = {index: [] for index in order}
    for _ in range(steps):
        shuffled.shuffle(order)
        for index in order:
            start = perf_counter()
            ids[index] = _next(decoders[index], ids[index])
            times[index].append((perf_counter() - start) * 1e3)
    timed = [times[index][_UNTIMED:] for index in sorted(times)]
    return [
        (statistics.median(taken), statistics.median(a / b for a, b in zip(taken, timed[0], strict=True)))
        for taken in timed
    ]


def _next(decoder: Decoder, ids: np.ndarray) -> np.ndarray:
    logits, _ = decoder.step(ids)
    following: np.ndarray = logits[:, -1:].argmax(-1)
    return following
