"""The evaluation of a quantized folder: its precision routers, every precision, and the best static allocations."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modcompile.config import check
from modcompile.devices import fastest_device
from modcompile.evaluation_text import (
    EvaluationTextConfig,
    describe_text,
    load_calibration_blocks,
    load_evaluation_blocks,
    text_as_json,
)
from modcompile.joint_plot import plot_jointly
from modcompile.joint_sweep import JointPoint, frontier, sweep_jointly
from modcompile.joint_table import joint_table
from modcompile.layerwise import LayerwiseQuantizeForCausalLM
from modcompile.precision_evaluation import PrecisionEvaluation, PrecisionMeasurement, evaluate_precisions
from modcompile.precision_plot import plot_precisions
from modcompile.progress import show_elapsed
from modcompile.weight_bytes import weight_bytes

PLOT, JOINT_PLOT = "precisions.png", "joint.png"
_WIDTH = 100


@dataclass(frozen=True)
class PrecisionEvaluationConfig:
    """How a quantized folder is evaluated.

    Raises:
        ConfigError: an option is outside of its range.
    """

    precisions: list[int] | None = field(
        default=None, metadata={"help": "Bits that blocks of a quantized folder may have (by default all that it has)."}
    )
    calibration_samples: int = field(
        default=4,
        metadata={"help": "Sequences of the built-in validation split by which static allocations of bits are chosen."},
    )

    def __post_init__(self) -> None:
        check("calibration_samples", self.calibration_samples, at_least=1)


def evaluate_quantized(
    folder: Path,
    text: EvaluationTextConfig,
    config: PrecisionEvaluationConfig,
    hard_threshold: float,
    sweep_ratios: Sequence[float] = (),
) -> dict[str, Any]:
    """Evaluate, print a table, plot, and return what `report.json` is to hold.

    Beside its routers a folder may have depth gates, which are then hard at the threshold; with some `sweep_ratios`
    precisions are also measured where the gates execute such shares.

    Raises:
        ArtifactError: the folder is incomplete, damaged, or of another version.
        CheckpointError: its base can't be read.
        ConfigError: it lacks a precision, or the sequence length is above the model's positions.
        DataError: the text can't be read, or has fewer than two tokens.
        OutputError: the plot can't be written.
        UnsupportedModelError: precisions are to be swept, and codes are those of look-up tables.
    """
    blocks = load_evaluation_blocks(text, folder)
    calibration = load_calibration_blocks(text, folder, config.calibration_samples)
    with show_elapsed("loading and tracing"):
        model = LayerwiseQuantizeForCausalLM.from_quantized(folder, config.precisions, device=fastest_device())
    threshold = hard_threshold if model.depth_routers else None
    if threshold is not None:
        model.set_hard_threshold(threshold)
    # A model whose bytes can't be counted is refused before minutes of work.
    read = weight_bytes(model) if sweep_ratios else None
    evaluation = evaluate_precisions(model, blocks, calibration)
    print(_table(evaluation, text, threshold))
    plot_precisions(evaluation, folder / PLOT)
    print(f"plotted in {folder / PLOT}")
    points: list[JointPoint] = []
    if read is not None:
        points = sweep_jointly(model, evaluation, blocks, calibration, sweep_ratios, read)
        print(joint_table(points))
        plot_jointly(points, folder / JOINT_PLOT)
        print(f"plotted in {folder / JOINT_PLOT}")
    best = frontier(points)
    return {
        **({"sweep": [_point_as_json(point, is_best=point in best) for point in points]} if points else {}),
        **text_as_json(text, evaluation.sequences, evaluation.predicted_tokens),
        **({} if threshold is None else {"hard_threshold": threshold}),
        "calibration_sequences": calibration.num_rows,
        "fixed": {str(bits): _as_json(measured) for bits, measured in evaluation.fixed.items()},
        "router": {
            **_as_json(evaluation.router),
            "trained": evaluation.trained,
            "caveats": evaluation.caveats,
            "shares_per_layer": evaluation.router.shares,
        },
        "static": [
            {**_as_json(measured), "bits_per_layer": allocation, "at_router": allocation == evaluation.at_router}
            for allocation, measured in evaluation.static.items()
        ],
        "sensitivity_per_layer": evaluation.sensitivity,
    }


def _as_json(measured: PrecisionMeasurement) -> dict[str, float]:
    return {"perplexity": measured.perplexity, "loss": measured.loss, "average_bits": measured.average_bits}


def _point_as_json(point: JointPoint, *, is_best: bool) -> dict[str, Any]:
    return {
        "way": point.way,
        "bits": point.bits,
        "active_ratio": point.active_ratio,
        "bytes_per_token": point.bytes_per_token,
        "on_frontier": is_best,
        **_as_json(point.measured),
    }


def _table(evaluation: PrecisionEvaluation, text: EvaluationTextConfig, threshold: float | None) -> str:
    """The numbers for a person."""
    rows = [("fixed", (bits,) * len(measured.shares), measured) for bits, measured in evaluation.fixed.items()]
    # Uniform ones are fixed precisions.
    rows += [("static", bits, measured) for bits, measured in evaluation.static.items() if len(set(bits)) > 1]
    gates = [] if threshold is None else [f"depth gates at threshold {threshold:g}"]
    lines = [describe_text(text, evaluation.sequences, evaluation.predicted_tokens)]
    lines.append(f"{'':7}  {'bits':>6}  {'perplexity':>10}  {'loss':>7}")
    for name, allocation, measured in rows:
        notes = ["the most bits within the router's"] if allocation == evaluation.at_router else []
        lines.append(_line(name, measured, notes))
    lines.append(_line("router", evaluation.router, [*evaluation.caveats, *gates]))
    averages = enumerate(evaluation.router.average_bits_per_block)
    layers = "router's bits by layer: " + " ".join(f"{layer}:{bits:.2f}" for layer, bits in averages)
    return "\n".join([*lines, *textwrap.wrap(layers, _WIDTH, subsequent_indent="  ")])


def _line(name: str, measured: PrecisionMeasurement, notes: list[str]) -> str:
    numbers = f"{name:7}  {measured.average_bits:6.2f}  {measured.perplexity:10.3f}  {measured.loss:7.4f}"
    return f"{numbers}  {'; '.join(notes)}".rstrip()
