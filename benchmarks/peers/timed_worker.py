"""What every worker does: load one model, generate, and tell how fast that was; or score a text.

Runs in the environments of peers as well, so it imports nothing but numpy.
"""

import json
import math
import resource
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Logits = NDArray[np.float32]


class Engine(Protocol):
    """A loaded model; all tokens are chosen greedily, by the runtime's own means if it has such."""

    def start(self, capacity: int) -> None:
        """Forget everything, and make room for a sequence of `capacity` tokens. Not timed."""

    def prefill(self, ids: Sequence[int]) -> int:
        """The token that follows on a prompt."""

    def step(self, token: int) -> int:
        """The token that follows on the one that `prefill` or `step` returned last."""

    def logits(self, ids: Sequence[int]) -> Logits:
        """Those `[T, V]` of every token of a sequence, for its perplexity. Not timed, and called without `start`."""


@dataclass(frozen=True)
class Workload:
    """What is timed. Counts are of tokens."""

    threads: int
    prompt: Sequence[int]
    """What is prefilled, and decoded from."""
    new_tokens: int
    long_prompt: Sequence[int]
    """What is prefilled only."""
    context: Sequence[int]
    """What is prefilled once, without being reported, to decode from; may be empty."""
    context_new_tokens: int
    repeats: int
    """After one more, which warms up."""


def measure(engine: Engine, work: Workload) -> dict[str, float]:
    """Tokens a second, medians over repeats (and for decoding over steps before), and MiB in memory."""
    prompts, decodes, long_prompts = [], [], []
    for _ in range(work.repeats + 1):
        seconds, step = _generate(engine, work.prompt, work.new_tokens)
        prompts.append(len(work.prompt) / seconds)
        decodes.append(1 / step)
        seconds, _ = _generate(engine, work.long_prompt, 1)
        long_prompts.append(len(work.long_prompt) / seconds)
    found = {
        "prefill": statistics.median(prompts[1:]),
        "prefill_long": statistics.median(long_prompts[1:]),
        "decode": statistics.median(decodes[1:]),
        "resident_mib": resident_mib(),
    }
    if work.context:
        _, step = _generate(engine, work.context, work.context_new_tokens)
        found |= {"decode_context": 1 / step, "resident_context_mib": resident_mib()}
    return found


def _generate(engine: Engine, prompt: Sequence[int], new_tokens: int) -> tuple[float, float]:
    """Seconds of a prefill, and the median of the steps after it."""
    engine.start(len(prompt) + new_tokens + 1)
    start = perf_counter()
    token = engine.prefill(prompt)
    prefill, steps = perf_counter() - start, []
    for _ in range(new_tokens):
        start = perf_counter()
        token = engine.step(token)
        steps.append(perf_counter() - start)
    return prefill, statistics.median(steps)


def summed_loss(logits: Logits, ids: Sequence[int]) -> float:
    """The cross-entropy of all tokens of a sequence but the first, from `logits [T, V]`, in nats."""
    total = 0.0
    for row, token in zip(logits[:-1], ids[1:], strict=True):
        shifted = row.astype(np.float64) - row.max()
        total += math.log(np.exp(shifted).sum()) - shifted[token]
    return total


def resident_mib() -> float:
    """What the process holds in memory, pages of files that it has mapped included."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize() / 2**20


def serve(load: Callable[[dict[str, Any], int], Engine]) -> None:
    """Do the one task that stdin describes, and write its result as the last line of stdout, both JSON.

    `load` takes what to load, and the number of threads. {"model", "threads", "windows"} asks for the loss of each
    window, {"model", "work"} for the fields of `Workload`.
    """
    request = json.load(sys.stdin)
    before = resident_mib()
    if "windows" in request:
        engine = load(request["model"], request["threads"])
        result: dict[str, Any] = {"losses": [summed_loss(engine.logits(ids), ids) for ids in request["windows"]]}
    else:
        work = Workload(**request["work"])
        result = measure(load(request["model"], work.threads), work) | {"resident_before_mib": before}
    print(f"\n{json.dumps(result)}")
