"""A whole comparison: make everyone's model, measure, and say how."""

import argparse
import math
import os
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from benchmarks.peers.case import Case
from benchmarks.peers.notes import notes, processor
from benchmarks.peers.own_exports import own_cases
from benchmarks.peers.peer_models import PACKAGES, installed_version, pytorch_cases
from benchmarks.peers.rounds import measure_rounds
from benchmarks.peers.source import make_source
from benchmarks.peers.timed_worker import Workload
from modcompile.export.verification import versions
from modcompile.progress import show_elapsed

_WINDOW = 512


def compare(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """What `report` and `plot` show, as JSON holds it. Models are written into `work`.

    Raises:
        RuntimeError: a command or worker fails, or no case is left.
    """
    work.mkdir(parents=True, exist_ok=True)
    with show_elapsed(f"making {args.model}"):
        source = make_source(args.model, work)
    # Absolute, but with its links: a Python that is called by another name leaves its environment.
    python = Path(args.peers).absolute() / "bin" / "python"
    with show_elapsed("exporting"):
        ours, models = own_cases(source, work)
    others, used, left_out = pytorch_cases(source), versions(), []
    for package, make in PACKAGES.items():
        version = installed_version(python, package)
        if version is None:
            left_out.append(package)
            continue
        with show_elapsed(f"making the models of {package}"):
            cases, told = make(source, work, python)
        others, models, used = [*cases, *others], models | told, used | {package: version}
    cases = [case for case in (*ours, *others) if args.only is None or args.only in case.name]
    if not cases:
        raise RuntimeError(f"no case has {args.only!r} in its name")
    positions = AutoConfig.from_pretrained(source.folder).max_position_embeddings
    context = max(min(args.context_tokens, positions - args.context_new_tokens - 1), 0)
    tokens = source.tokens(max(context, args.long_prompt_tokens, args.prompt_tokens))
    load = Workload(
        threads=args.threads,
        prompt=tokens[: args.prompt_tokens],
        new_tokens=args.new_tokens,
        long_prompt=tokens[: args.long_prompt_tokens],
        context=tokens[:context],
        context_new_tokens=args.context_new_tokens,
        repeats=args.repeats,
    )
    rounds = measure_rounds(cases, load, args.rounds)
    windows = source.windows(args.windows, _WINDOW)
    return {
        "model": args.model,
        "machine": {"processor": processor(), "cores": os.cpu_count(), "load_before": os.getloadavg()},
        "versions": used,
        "arguments": vars(args),
        "tokens": {"prompt": args.prompt_tokens, "long_prompt": args.long_prompt_tokens, "context": context},
        "peers": [case.name for case in others if case in cases],
        "models": models,
        "rounds": rounds,
        "perplexity": {
            case.name: _perplexity(case, windows, args.threads) for case in cases if case.scored and windows
        },
        "notes": notes(args, used, left_out, context),
    }


def _perplexity(case: Case, windows: list[list[int]], threads: int) -> float:
    losses = case.losses(windows, threads)
    return math.exp(sum(losses) / sum(len(window) - 1 for window in windows))
