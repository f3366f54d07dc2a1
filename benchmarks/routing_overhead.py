"""python -m benchmarks.routing_overhead: what routing costs a decode step whose gates are all open, part by part.

Exports a model in 4 bits, dense and routed in several ways, and compares their steps with the dense ones as
`benchmarks.neighbouring_steps` does. What a part costs is told by taking it out of the graph, one after the other.
Writes routing_overhead.json and .md, or routing_overhead_SHAPE.json and .md, into benchmarks/results.
"""

import argparse
import json
import platform
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

import onnx_ir as ir

from benchmarks.altered_graphs import save_beside, weights_in_branches, without_ifs
from benchmarks.cost_arguments import model_arguments, model_name, random_base, results_name
from benchmarks.neighbouring_steps import Neighbours, compare_steps
from benchmarks.peers.child_python import run_module
from modcompile.checkpoints import save_base
from modcompile.export.session import MODEL_FILE
from modcompile.export.verification import versions

_RESULTS = Path(__file__).parent / "results"
_WEIGHTS = "--export --verify none --weights int4 --group_size 128"
_ROUTED = f"{_WEIGHTS} --router_hidden_size 0"
_UNMASKED = f"{_ROUTED} --unmasked_branch always"
DENSE, MASKS = "dense", "no unmasked branch, masks"
EXPORTS = {
    DENSE: f"{_WEIGHTS} --always_active all",
    "unmasked branch": f"{_UNMASKED} {{joined}}",
    "unmasked branch, every gate decided alone": f"{_UNMASKED} --blocks_per_gate {{blocks_per_gate}}",
    "unmasked branch, a gate for every block": f"{_UNMASKED} --gates_per_decision 5",
    "unmasked branch, low-rank adapters": f"{_UNMASKED} {{joined}} --skip_adapter low_rank",
    "no unmasked branch": f"{_ROUTED} {{joined}} --unmasked_branch never",
    "no unmasked branch, low-rank adapters": f"{_ROUTED} {{joined}} --skip_adapter low_rank --unmasked_branch never",
    MASKS: f"{_ROUTED} {{joined}} --prefill mask --unmasked_branch never",
}
"""What is measured, and how it is exported; `joined` gates are as in the exports that peers are compared with."""


def main() -> None:
    """Measure, print, and write the results."""
    parser = model_arguments(__doc__)
    parser.add_argument("--threads", type=int, default=1, help="of ONNX Runtime (default: %(default)s)")
    parser.add_argument("--prompt_tokens", type=int, default=64, help="(default: %(default)s)")
    parser.add_argument("--new_tokens", type=int, default=128, help="(default: %(default)s)")
    parser.add_argument("--processes", type=int, default=9, help="(default: %(default)s)")
    parser.add_argument("--blocks_per_gate", type=int, default=3, help="(default: %(default)s)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        models = export_all(args, Path(folder))
        measured = compare_steps(
            models, args.prompt_tokens, args.new_tokens, threads=args.threads, processes=args.processes
        )
    result: dict[str, Any] = {
        "machine": {"processor": platform.processor() or platform.machine()},
        "versions": versions(),
        "arguments": vars(args),
        "model": model_name(args),
        "steps": {name: vars(taken) for name, taken in measured.items()},
    }
    _RESULTS.mkdir(exist_ok=True)
    name = results_name("routing_overhead", args)
    (_RESULTS / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    text = table(measured, result)
    (_RESULTS / f"{name}.md").write_text(text)
    print(text)


def export_all(args: argparse.Namespace, folder: Path) -> dict[str, Path]:
    """Write the models; returns their files by name."""
    source = str(args.model)
    if args.random is not None:
        source = str(folder / "source")
        save_base(random_base(args.random).bfloat16(), None, Path(source))
    joined = f"--blocks_per_gate {args.blocks_per_gate} --gates_per_decision 5"
    files = {}
    for number, (name, options) in enumerate(EXPORTS.items()):
        given = options.format(joined=joined, blocks_per_gate=args.blocks_per_gate)
        output = folder / f"export{number}"
        arguments = [source, "--output_dir", str(output), *shlex.split(given)]
        run_module(Path(sys.executable), "modcompile.rewrite", arguments)
        files[name] = output / "onnx" / MODEL_FILE
    return files | alter(files[MASKS], folder)


def alter(masks: Path, folder: Path) -> dict[str, Path]:
    """Write what is left of an export with masks when parts of it are taken out."""
    altered = {
        f"{MASKS}, weights in the branches": weights_in_branches(ir.load(masks)),
        f"{MASKS}, without Ifs": without_ifs(ir.load(masks)),
        "deciding only: without Ifs and masks": without_ifs(ir.load(masks), masks=False),
    }
    files = {}
    for number, (name, model) in enumerate(altered.items()):
        save_beside(model, folder / f"altered{number}")
        files[name] = folder / f"altered{number}" / MODEL_FILE
    return files


def table(measured: dict[str, Neighbours], result: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = ["| every gate open | ms/token | against dense | middle half |", "|---|---|---|---|"]
    for name, taken in measured.items():
        lower, median, upper = taken.quartiles()
        milliseconds = sorted(taken.milliseconds)[len(taken.milliseconds) // 2]
        lines.append(f"| {name} | {milliseconds:.2f} | {median - 1:+.1%} | {lower - 1:+.1%} to {upper - 1:+.1%} |")
    used, arguments = result["versions"], result["arguments"]
    routers = f"a linear router for every {arguments['blocks_per_gate']} blocks, five decided at once"
    run = f"{arguments['processes']} processes of {arguments['threads']} thread(s), sessions stepping in turn"
    lines += [
        "",
        f"- {result['model']}, int4 in groups of 128; {routers}, where nothing else is said.",
        f"- {arguments['new_tokens']} tokens after {arguments['prompt_tokens']}; {run}.",
        "- Ratios of steps that follow each other: their median in a process, and quartiles over processes.",
        f"- ONNX Runtime {used['onnxruntime']}.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
