"""Measure cases in turn, so that a noisy machine is noisy for all alike."""

import sys
from collections.abc import Sequence
from dataclasses import replace

from benchmarks.peers.case import Case
from benchmarks.peers.timed_worker import Workload

Rounds = dict[str, list[dict[str, float]]]
"""What `timed_worker.measure` found, by the name of the case, one a round."""


def failures(cases: Sequence[Case], work: Workload) -> dict[str, str]:
    """Run each case for a token or two; returns why, of those that can't run, by their names.

    It also has every file read from the disk before the first round.
    """
    short = replace(work, prompt=work.prompt[:2], long_prompt=work.prompt[:2], new_tokens=1, context=[], repeats=1)
    found = {}
    for case in cases:
        try:
            case.measure(short)
        except RuntimeError as error:
            found[case.name] = str(error)
    return found


def measure_rounds(cases: Sequence[Case], work: Workload, rounds: int) -> Rounds:
    """Every case once a round, each time in a fresh process, in an order that is turned round in every other round.

    Raises:
        RuntimeError: a worker fails.
    """
    found: Rounds = {case.name: [] for case in cases}
    for number in range(rounds):
        for case in cases[:: -1 if number % 2 else 1]:
            found[case.name].append(case.measure(work))
        print(f"round {number + 1} of {rounds} is done", file=sys.stderr, flush=True)
    return found
