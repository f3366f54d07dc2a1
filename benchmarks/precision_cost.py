"""python -m benchmarks.precision_cost: what a choice of precisions costs and gains in ONNX Runtime.

Quantizes a model (rounding to nearest: speed does not depend on the rounding) and exports it at 4 bits alone, at 8 bits
alone, and with 4 and 8 bits to choose from, nested and separate; then measures them in turn, forced to 4 and to 8 bits.
Writes precision_cost.json and .md, or precision_cost_SHAPE.json and .md, into benchmarks/results.
"""

import json
import platform
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from transformers import PreTrainedModel

from benchmarks.cost_arguments import cost_arguments, make_base, model_name, results_name
from benchmarks.decode_speed import Case, compare
from modcompile.export.build_model import build_model
from modcompile.export.verification import versions
from modcompile.layerwise import LayerwiseQuantizeForCausalLM
from modcompile.precision_config import PrecisionRouterConfig, QuantizationConfig
from modcompile.quantizing import quantize_base

_RESULTS = Path(__file__).parent / "results"
_FOUR, _EIGHT, _NESTED, _SEPARATE = "4 bits alone", "8 bits alone", "nested 4 + 8", "separate 4 + 8"
_FORCED = 1e4
_FIRST, _SECOND = [_FORCED, 0.0], [0.0, _FORCED]


def main() -> None:
    """Measure, print, and write the results."""
    parser = cost_arguments(__doc__)
    parser.add_argument("--group_size", type=int, default=64, help="(default: %(default)s)")
    args = parser.parse_args()

    base = make_base(args)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        block_mib = {
            _FOUR: export(base, folder / "four.onnx", [4], "nested", args.group_size),
            _EIGHT: export(base, folder / "eight.onnx", [8], "separate", args.group_size),
            _NESTED: export(base, folder / "nested.onnx", [4, 8], "nested", args.group_size),
            _SEPARATE: export(base, folder / "separate.onnx", [4, 8], "separate", args.group_size),
        }
        measured = compare(
            {
                _FOUR: Case(folder / "four.onnx"),
                _EIGHT: Case(folder / "eight.onnx"),
                f"{_NESTED}, all at 4": Case(folder / "nested.onnx", precision_bias=_FIRST),
                f"{_NESTED}, all at 8": Case(folder / "nested.onnx", precision_bias=_SECOND),
                f"{_SEPARATE}, all at 4": Case(folder / "separate.onnx", precision_bias=_FIRST),
                f"{_SEPARATE}, all at 8": Case(folder / "separate.onnx", precision_bias=_SECOND),
            },
            np.random.default_rng(0).integers(0, 1000, (1, args.prompt_tokens)),
            args.new_tokens,
            threads=args.threads,
            rounds=args.rounds,
            repeats=args.repeats,
        )
    four = measured[_FOUR]
    result: dict[str, Any] = {
        "machine": {"processor": platform.processor() or platform.machine(), "threads": args.threads},
        "versions": versions(),
        "arguments": vars(args),
        "model": model_name(args),
        "block_mib": block_mib,
        "speed": {
            name: {
                "prefill_ms": speed.prefill_ms,
                "decode_ms": speed.decode_ms,
                "decode_spread": speed.decode_spread,
                "decode_against_four": speed.decode_against(four),
                "resident_mib": speed.resident_mib,
            }
            for name, speed in measured.items()
        },
        "eight_against_four": {
            kind: measured[f"{kind}, all at 8"].decode_against(measured[f"{kind}, all at 4"])
            for kind in (_NESTED, _SEPARATE)
        },
    }
    _RESULTS.mkdir(exist_ok=True)
    name = results_name("precision_cost", args)
    (_RESULTS / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    text = table(result)
    (_RESULTS / f"{name}.md").write_text(text)
    print(text)


def export(base: PreTrainedModel, path: Path, precisions: list[int], sharing: Any, group_size: int) -> float:
    """Write a model; return the MiB of what belongs to its blocks (codes, scales, norms, routers)."""
    config = QuantizationConfig(precisions=precisions, weight_sharing=sharing, group_size=group_size, method="rtn")
    model = LayerwiseQuantizeForCausalLM(quantize_base(base, config), PrecisionRouterConfig())
    built = build_model(model.export_graph())
    held = [value for name, value in built.graph.initializers.items() if name.startswith("blocks.")]
    size = sum(value.const_value.nbytes for value in held if value.const_value is not None)
    ir.save(built, path, external_data=f"{path.name}.data")
    return size / 2**20


def table(result: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "| case | prefill ms | decode ms/token | spread | speed against 4 bits alone | blocks MiB | resident MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in result["speed"].items():
        slower, median, faster = (1 / ratio for ratio in reversed(row["decode_against_four"]))
        blocks = result["block_mib"][name.partition(",")[0]]
        lines.append(
            f"| {name} | {row['prefill_ms']:.1f} | {row['decode_ms']:.2f} | {row['decode_spread']:.0%} | "
            f"{median:.3f} x ({slower:.3f} to {faster:.3f}) | {blocks:.0f} | {row['resident_mib']:.0f} |"
        )
    speed, blocks = result["speed"], result["block_mib"]
    arguments, used = result["arguments"], result["versions"]
    nested, separate = (1 / result["eight_against_four"][kind][1] for kind in (_NESTED, _SEPARATE))
    memory = speed[f"{_NESTED}, all at 8"]["resident_mib"] / speed[_EIGHT]["resident_mib"]
    lines += [
        "",
        f"- All at 8 bits against all at 4: nested {nested:.2f} x the speed, separate {separate:.2f} x.",
        f"- Blocks of nested 4 + 8 against 8 bits alone: {blocks[_NESTED] / blocks[_EIGHT]:.2f} x the size.",
        f"- Resident memory of the session, nested 4 + 8 against 8 bits alone: {memory:.2f} x.",
        f"- {result['model']}, groups of {arguments['group_size']}, {arguments['threads']} threads.",
        f"- ONNX Runtime {used['onnxruntime']}.",
        f"- {arguments['rounds']} rounds of {arguments['repeats']} repeats, every case in its own process.",
        "- Medians; spread and brackets are the middle half; ratios are taken within a repeat.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
