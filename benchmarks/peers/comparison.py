"""A whole comparison: make everyone's model, measure, and say how."""

import argparse
import math
import os
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from benchmarks.peers.case import Case
from benchmarks.peers.notes import notes, processor
from benchmarks.peers.own_exports import DENSE, DENSE_LARGE
from benchmarks.peers.participants import make_participants
from benchmarks.peers.rounds import failures, measure_rounds
from benchmarks.peers.source import Source, make_source
from benchmarks.peers.timed_worker import Workload

_WINDOW = 512


def compare(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """What `report` and `plot` show, as JSON holds it. Models are written into `work`.

    Raises:
        RuntimeError: a command or a worker of ours fails, or no case is left; a peer that fails is left out.
    """
    machine = {"processor": processor(), "cores": os.cpu_count(), "load_before": os.getloadavg()[0]}
    work.mkdir(parents=True, exist_ok=True)
    source = make_source(args.model, work)
    everyone = make_participants(source, work, Path(args.peers))
    cases = [case for case in (*everyone.ours, *everyone.peers) if args.only is None or args.only in case.name]
    workload = _workload(args, source)
    failed = failures(cases, workload)
    for case in everyone.ours:
        if case.name in failed:
            raise RuntimeError(failed[case.name])
    cases = [case for case in cases if case.name not in failed]
    if not cases:
        raise RuntimeError(f"no case that can run has {args.only or ''!r} in its name")
    rounds = measure_rounds(cases, workload, args.rounds)
    windows = source.windows(args.windows, _WINDOW)
    scored = [case for case in cases if case.scored] if windows else []
    return {
        "model": args.model,
        "machine": machine,
        "versions": everyone.versions,
        "arguments": vars(args),
        "tokens": {
            "prompt": len(workload.prompt),
            "long_prompt": len(workload.long_prompt),
            "context": len(workload.context),
        },
        "baselines": [DENSE, DENSE_LARGE],
        "peers": [case.name for case in everyone.peers if case in cases],
        "models": everyone.models,
        "rounds": rounds,
        "perplexity": {case.name: _perplexity(case, windows, args.threads) for case in scored},
        "notes": [
            *(f"{name} is left out, as it fails: {reason}." for name, reason in failed.items()),
            *notes(args, machine, everyone.versions, everyone.left_out, len(workload.context)),
        ],
    }


def _workload(args: argparse.Namespace, source: Source) -> Workload:
    positions = AutoConfig.from_pretrained(source.folder).max_position_embeddings
    context = max(min(args.context_tokens, positions - args.context_new_tokens - 1), 0)
    tokens = source.tokens(max(context, args.long_prompt_tokens, args.prompt_tokens))
    return Workload(
        threads=args.threads,
        prompt=tokens[: args.prompt_tokens],
        new_tokens=args.new_tokens,
        long_prompt=tokens[: args.long_prompt_tokens],
        context=tokens[:context],
        context_new_tokens=args.context_new_tokens,
        repeats=args.repeats,
    )


def _perplexity(case: Case, windows: list[list[int]], threads: int) -> float:
    losses = case.losses(windows, threads)
    return math.exp(sum(losses) / sum(len(window) - 1 for window in windows))
