"""python -m benchmarks.operator_cost: where a decode step of our exports goes, operator by operator.

Exports a model as `benchmarks.peers` does (with its --work_dir, takes what that has left there), decodes after a prompt
with ONNX Runtime's profiler on, and tells for each kind of operator how often a step calls it, how long that takes, how
many bytes of weights it reads, and how fast. Beside it how fast so many threads can read memory at all. Profiling makes
a step longer, so the step without it is told as well. Writes operator_cost_MODEL.json and .md into benchmarks/results.
"""

import argparse
import json
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from benchmarks.peers.built_model import build_once
from benchmarks.peers.own_exports import OWN_CASES, OwnCase
from benchmarks.peers.source import MODELS, make_source
from modcompile.export.decoder import Decoder
from modcompile.export.huge_pages import huge_pages
from modcompile.export.session import MODEL_FILE, RoutedSession
from modcompile.export.verification import versions

_RESULTS = Path(__file__).parent / "results"
_READ_BYTES = 1 << 29  # more than any cache holds
_PRODUCTS = ("MatMulNBits", "MatMul", "Gemm")
_FEW = 0.01  # share of a step below which an operator is told with the others


def main() -> None:
    """Measure, print, and write the results."""
    args = _parser().parse_args()
    steps = (args.prompt_tokens, args.new_tokens, args.threads)
    # A process for each, which takes its threads and its memory away with it.
    with (
        tempfile.TemporaryDirectory() as temporary,
        ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as processes,
    ):
        work = Path(args.work_dir or temporary).absolute() / args.model
        source = make_source(args.model, work)
        cases = {}
        for own in OWN_CASES:
            if own.name in args.cases:
                folder = work / own.export.folder_name
                build_once(folder, partial(own.export.build, source))
                cases[own.name] = processes.submit(measure, own, folder / "onnx" / MODEL_FILE, *steps).result()
        read = processes.submit(read_bandwidth, args.threads).result()
    result = {
        "model": args.model,
        "arguments": vars(args),
        "versions": versions(),
        "read_gigabytes_per_second": read,
        "cases": cases,
    }
    _RESULTS.mkdir(exist_ok=True)
    text = table(result)
    (_RESULTS / f"operator_cost_{args.model}.json").write_text(json.dumps(result, indent=2) + "\n")
    (_RESULTS / f"operator_cost_{args.model}.md").write_text(text)
    print(text)


def measure(own: OwnCase, model_file: Path, prompt_tokens: int, new_tokens: int, threads: int) -> dict[str, Any]:
    """Milliseconds of a plain decode step, and of each kind of operator in a profiled one: medians over the steps."""
    count = RoutedSession(model_file).num_thresholds if own.skipped is not None else 0
    pages = huge_pages if own.huge_pages else nullcontext
    with pages():
        session = RoutedSession(
            model_file, thresholds=own.thresholds(count), num_threads=threads, providers=["CPUExecutionProvider"]
        )
        decode(session, prompt_tokens, 1)
    plain = statistics.median(decode(session, prompt_tokens, new_tokens))
    with tempfile.TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.log_severity_level, options.enable_mem_pattern = 3, False  # as in `LoadedModel`
        options.intra_op_num_threads = threads
        options.enable_profiling, options.profile_file_prefix = True, str(Path(folder) / "profile")
        with pages():
            profiled = ort.InferenceSession(str(model_file), options, providers=["CPUExecutionProvider"])
            session.model.session = profiled
            decode(session, prompt_tokens, 1)
        decode(session, prompt_tokens, new_tokens)
        events = json.loads(Path(profiled.end_profiling()).read_text())
    operators = per_operator(events, weight_bytes(model_file), new_tokens)
    return {"step_ms": plain * 1e3, "operators": operators}


def decode(session: RoutedSession, prompt_tokens: int, new_tokens: int) -> list[float]:
    """Seconds of each greedy step after a prompt of random tokens."""
    decoder = Decoder(session, 1, prompt_tokens + new_tokens)
    ids, times = np.random.default_rng(0).integers(0, 100, (1, prompt_tokens)), []
    for _ in range(new_tokens + 1):
        start = perf_counter()
        logits, _ = decoder.step(ids)
        times.append(perf_counter() - start)
        ids = logits[:, -1:].argmax(-1)
    return times[1:]


def weight_bytes(model_file: Path) -> dict[str, int]:
    """By the name of a node that reads all of its weights, their bytes."""
    model = ir.load(model_file)
    found = {}
    for node in model.graph.all_nodes():
        if node.name is not None and node.op_type in _PRODUCTS:
            constants = [value.const_value for value in node.inputs if value is not None]
            found[node.name] = sum(constant.nbytes for constant in constants if constant is not None)
    return found


def per_operator(
    events: Sequence[dict[str, Any]], read: dict[str, int], last_steps: int
) -> dict[str, dict[str, float]]:
    """Of each kind of operator in the last runs of a profile: calls, milliseconds and megabytes a step, medians.

    What runs in a branch of an If is told as what it is, and the If with what is left.
    """
    runs = sorted((e for e in events if e["name"] == "model_run"), key=lambda event: event["ts"])[-last_steps:]
    kernels = sorted(
        (e for e in events if e.get("cat") == "Node" and e["name"].endswith("_kernel_time")), key=lambda e: e["ts"]
    )
    steps = []
    for run in runs:
        within = [event for event in kernels if run["ts"] <= event["ts"] < run["ts"] + run["dur"]]
        step: dict[str, list[float]] = defaultdict(lambda: [0, 0, 0])
        for event in within:
            kind, start, stop = event["args"]["op_name"], event["ts"], event["ts"] + event["dur"]
            inner = 0
            if kind == "If":
                inner = sum(e["dur"] for e in within if e is not event and start <= e["ts"] and e["ts"] < stop)
            row = step[kind]
            row[0] += 1
            row[1] += (event["dur"] - inner) / 1e3
            row[2] += read.get(event["name"].removesuffix("_kernel_time"), 0) / 1e6
        steps.append(step)
    kinds = {kind for step in steps for kind in step}
    told = {}
    for kind in kinds:
        calls, milliseconds, megabytes = (
            statistics.median(column) for column in zip(*(step[kind] for step in steps), strict=True)
        )
        told[kind] = {"calls": calls, "ms": milliseconds, "megabytes": megabytes}
    return dict(sorted(told.items(), key=lambda item: -item[1]["ms"]))


def read_bandwidth(threads: int) -> float:
    """Gigabytes a second that so many threads read, each a part of an array of its own: the best of some attempts."""
    with huge_pages():
        arrays = [np.ones(_READ_BYTES // 8 // threads) for _ in range(threads)]
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(8):
            start = perf_counter()
            list(pool.map(np.max, arrays))  # numpy lets go of the interpreter meanwhile
            best = max(best, _READ_BYTES / (perf_counter() - start) / 1e9)
    return best


def table(result: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = []
    for name, case in result["cases"].items():
        operators = case["operators"]
        whole = sum(row["ms"] for row in operators.values())
        lines += [f"{name}: {case['step_ms']:.2f} ms a step, {whole:.2f} in operators while profiled.", ""]
        lines += ["| operator | calls a step | ms a step | share | MB of weights | GB/s |", "|---|---|---|---|---|---|"]
        others = {"calls": 0.0, "ms": 0.0, "megabytes": 0.0}
        for kind, row in operators.items():
            if row["ms"] < _FEW * whole:
                others = {key: value + row[key] for key, value in others.items()}
            else:
                lines.append(_line(kind, row, whole))
        lines += [_line("others", others, whole), ""]
    arguments, used = result["arguments"], result["versions"]
    decoded = f"{arguments['new_tokens']} tokens after {arguments['prompt_tokens']}"
    lines += [
        f"- {result['model']}, {arguments['threads']} threads, {decoded}, ONNX Runtime {used['onnxruntime']}.",
        f"- Memory: {arguments['threads']} threads read {result['read_gigabytes_per_second']:.1f} GB/s.",
        "- Medians over steps; a profiled operator takes longer by what it takes to write down its time.",
        "",
    ]
    return "\n".join(lines)


def _line(kind: str, row: dict[str, float], whole: float) -> str:
    speed = f"{row['megabytes'] / row['ms']:.1f}" if row["megabytes"] >= 1 else ""
    megabytes = f"{row['megabytes']:.1f}" if row["megabytes"] >= 0.1 else ""
    return f"| {kind} | {row['calls']:.0f} | {row['ms']:.2f} | {row['ms'] / whole:.0%} | {megabytes} | {speed} |"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="smollm2", help="(default: %(default)s)")
    parser.add_argument("--work_dir", help="keep the models that are made here, and use those that are there")
    parser.add_argument("--threads", type=int, default=2, help="of ONNX Runtime (default: %(default)s)")
    parser.add_argument("--prompt_tokens", type=int, default=64, help="(default: %(default)s)")
    parser.add_argument("--new_tokens", type=int, default=64, help="(default: %(default)s)")
    names = [own.name for own in OWN_CASES]
    parser.add_argument(
        "--cases", nargs="+", choices=names, metavar="CASE", default=names, help="of benchmarks.peers (default: all)"
    )
    return parser


if __name__ == "__main__":
    main()
