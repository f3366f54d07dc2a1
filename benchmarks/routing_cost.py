"""python -m benchmarks.routing_cost: what routing costs and gains in ONNX Runtime, and what an export takes.

Exports a model dense and routed (routers everywhere, fp32), then measures in turn: what `torch.onnx.export` makes of
the dense model; our dense export; the routed one with every block executed; with ten blocks always skipped; with all
skipped. Exports it also at twice the depth (layers repeated), for the growth of export time. Writes
routing_cost.json and .md, or routing_cost_SHAPE.json and .md, into benchmarks/results.
"""

import argparse
import copy
import json
import platform
import resource
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import onnx_ir as ir
from transformers import PreTrainedModel

from benchmarks.cost_arguments import cost_arguments, make_base, model_name, results_name
from benchmarks.decode_speed import Case, compare
from benchmarks.plain_export import plain_export
from modcompile.config import RouterConfig
from modcompile.export.build_model import build_model
from modcompile.export.session import RoutedSession
from modcompile.export.verification import versions
from modcompile.passes.outlined_form import gated_layers
from modcompile.routed_graph import build_routed, trace_outlined
from modcompile.tracing import find_layers

_RESULTS = Path(__file__).parent / "results"
_PLAIN, _DENSE, _NONE = "torch.onnx.export", "dense export", "routed, none skipped"


def main() -> None:
    """Measure, print, and write the results."""
    parser = cost_arguments(__doc__)
    parser.add_argument("--skipped", type=int, default=10, help="blocks that are always skipped (default: %(default)s)")
    args = parser.parse_args()

    base = make_base(args)
    checkpoint_mib = sum(parameter.numel() * 4 for parameter in base.parameters()) / 2**20
    with tempfile.TemporaryDirectory() as folder:
        seconds = export_both(base, Path(folder))
        peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        result: dict[str, Any] = {
            "machine": {"processor": platform.processor() or platform.machine(), "threads": args.threads},
            "versions": versions(),
            "arguments": vars(args),
            "model": model_name(args),
            "export_seconds": seconds,
            "export_seconds_twice_the_depth": export_twice_the_depth(base, Path(folder)),
            "checkpoint_mib": checkpoint_mib,
            "peak_mib": peak_mib,
            "plain_export_seconds": export_plainly(base, Path(folder)),
            "speed": speeds(Path(folder), args),
        }
    _RESULTS.mkdir(exist_ok=True)
    name = results_name("routing_cost", args)
    (_RESULTS / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    text = table(result)
    (_RESULTS / f"{name}.md").write_text(text)
    print(text)


def export_both(base: PreTrainedModel, folder: Path) -> dict[str, float]:
    """Write dense.onnx and routed.onnx; return the seconds that tracing, rewriting and writing each took."""
    seconds = {}
    for name in ("dense", "routed"):
        start = perf_counter()
        graph = trace_outlined(base) if name == "dense" else build_routed(base, RouterConfig()).hard_graph()
        ir.save(build_model(graph), folder / f"{name}.onnx", external_data=f"{name}.onnx.data")
        seconds[name] = perf_counter() - start
    return seconds


def export_twice_the_depth(base: PreTrainedModel, folder: Path) -> float:
    """Seconds of the routed export of a model that has every layer twice (parameters shared, so no more memory)."""
    deeper = copy.copy(base)
    layers = find_layers(base)
    members = list(layers)
    layers.extend([copy.copy(layer) for layer in members])
    try:
        start = perf_counter()
        graph = build_routed(deeper, RouterConfig()).hard_graph()
        assert len(gated_layers(graph)) == 2 * len(members)
        ir.save(build_model(graph), folder / "deep.onnx", external_data="deep.onnx.data")
        return perf_counter() - start
    finally:
        del layers[len(members) :]


def export_plainly(base: PreTrainedModel, folder: Path) -> float:
    """Write plain.onnx; return the seconds that took."""
    start = perf_counter()
    plain_export(base, folder / "plain.onnx")
    return perf_counter() - start


def speeds(folder: Path, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Milliseconds of prefill and decode, their spread, and decode times relative to the two cases they answer to."""
    dense, routed = folder / "dense.onnx", folder / "routed.onnx"
    count = RoutedSession(routed).num_thresholds
    first = (count - args.skipped) // 2
    some = [2.0 if first <= layer < first + args.skipped else 0.0 for layer in range(count)]
    measured = compare(
        {
            _PLAIN: Case(folder / "plain.onnx"),
            _DENSE: Case(dense),
            _NONE: Case(routed, [0.0] * count),
            f"routed, {args.skipped} of {count} skipped": Case(routed, some),
            "routed, all skipped": Case(routed, [2.0] * count),
        },
        np.random.default_rng(0).integers(0, 1000, (1, args.prompt_tokens)),
        args.new_tokens,
        threads=args.threads,
        rounds=args.rounds,
        repeats=args.repeats,
    )
    return {
        name: {
            "prefill_ms": speed.prefill_ms,
            "decode_ms": speed.decode_ms,
            "decode_spread": speed.decode_spread,
            "decode_against_plain": speed.decode_against(measured[_PLAIN]),
            "decode_against_dense": speed.decode_against(measured[_DENSE]),
            "decode_against_none_skipped": speed.decode_against(measured[_NONE]),
        }
        for name, speed in measured.items()
    }


def table(result: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "| case | prefill ms | decode ms/token | spread | decode time against dense | speed against none skipped |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in result["speed"].items():
        lower, median, upper = row["decode_against_dense"]
        speed_up = 1 / row["decode_against_none_skipped"][1]
        lines.append(
            f"| {name} | {row['prefill_ms']:.1f} | {row['decode_ms']:.2f} | {row['decode_spread']:.0%} | "
            f"{median:.3f} ({lower:.3f} to {upper:.3f}) | {speed_up:.2f} x |"
        )
    *_, none, some, _ = result["speed"].values()
    overhead = none["decode_against_dense"][1] - 1
    saved = 1 - some["decode_against_none_skipped"][1]
    break_even = result["arguments"]["skipped"] * (1 - 1 / (1 + overhead)) / saved
    against_plain = none["decode_against_plain"][1] - 1
    seconds, deep = result["export_seconds"]["routed"], result["export_seconds_twice_the_depth"]
    arguments, used = result["arguments"], result["versions"]
    lines += [
        "",
        f"- Routers and `If`s, none skipped, against the dense export: {overhead:+.1%}.",
        f"- The same against the dense model of `torch.onnx.export`: {against_plain:+.1%}.",
        f"- Break-even: {break_even:.1f} blocks skipped.",
        f"- Trace, rewrite, lower and write: {seconds:.1f} s; at twice the depth {deep / seconds:.2f} x.",
        f"- `torch.onnx.export` of the dense model: {result['plain_export_seconds']:.1f} s.",
        f"- Peak memory of that: {result['peak_mib']:.0f} MiB, for a checkpoint of {result['checkpoint_mib']:.0f} MiB.",
        f"- {result['model']}, fp32, {arguments['threads']} threads, ONNX Runtime {used['onnxruntime']}.",
        f"- {arguments['rounds']} rounds of {arguments['repeats']} repeats, every case in its own process.",
        "- Medians; spread and brackets are the middle half; ratios are taken within a repeat.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
