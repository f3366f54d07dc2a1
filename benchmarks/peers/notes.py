"""The machine, how the figures were taken, and what each one does: the notes under a report."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_FAIRNESS = """
All: a batch of 1, the same prompt, greedy, one repeat of everything before those that count.
Resident memory: after loading, prefilling both prompts and decoding, pages of mapped files included; the column beside
it is the same process with its libraries, before it loads the model.
Ours: modcompile's decoder, the logits of the last token of a prompt; it asks the kernel for huge pages for the weights,
as modcompile.generate does, which no other does here.
onnxruntime-genai: the model of its own builder, accuracy level 4, groups of 32 unless it says otherwise, with the
threads set (its default is 1), one buffer for past and present. It computes the logits of all tokens of a prompt, or of
the last where it says so.
llama.cpp: its own functions, its defaults but for the threads (weights repacked for this processor, a cache in
float16), with its flash attention, which it takes by default, and without. It computes the logits of the last token of
a prompt. Q4_0 has all matrices at 4 bits, embeddings and head as well.
transformers: eager, its default attention, the logits of the last token of a prompt.
Soft gates: eager; every gate is computed, every block run and mixed by its gate; the logits of all tokens.
Ours: groups of 32, rounded to nearest; groups of 128 by GPTQ, without zero points, or to nearest
where weights are random.
Routed: linear routers, a gate for 3 blocks (6 where it is coarse) of SmolLM2, for 1 (2) of a larger model; five gates
are decided at once.
Skipped blocks are the same for every token, forced by thresholds: what that saves, not what routers would choose.
Random routers: a gate a block, each closed for 30 % of the tokens, for each token others.
Perplexity: each sequence on its own. Writing a model: its commands, with the start of each process.
"""


def processor() -> str:
    """The name of this machine's processor."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def notes(
    args: argparse.Namespace,
    machine: Mapping[str, Any],
    used: Mapping[str, str],
    left_out: Sequence[str],
    context: int,
) -> list[str]:
    """One a line; `used` are versions by their packages, `left_out` packages, `context` counts tokens."""
    return [
        *(f"{package} is left out, as {args.peers} has none: run make bench-peers." for package in left_out),
        f"{args.model}, {args.threads} threads, {machine['processor']}, {machine['cores']} cores.",
        f"Running processes before the start: {machine['load_before']:.1f}; beside others, figures mean little.",
        f"{', '.join(f'{package} {version}' for package, version in used.items())}.",
        f"{args.rounds} rounds of {args.repeats} repeats, every case in a process of its own, in turn.",
        "Medians over rounds and, in brackets, their middle half; ratios are taken within a round.",
        f"Decoding: the median step of {args.new_tokens}, or of {args.context_new_tokens} after {context} tokens.",
        *_sentences(_FAIRNESS),
    ]


def _sentences(text: str) -> list[str]:
    """Wrapped lines joined; a note ends with a line that ends with a full stop."""
    joined: list[str] = []
    for line in text.strip().splitlines():
        if joined and not joined[-1].endswith("."):
            joined[-1] += f" {line}"
        else:
            joined.append(line)
    return joined
