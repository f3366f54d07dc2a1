"""The evaluation of a routed folder: perplexity, loss and active ratio on a text, dense, soft and hard."""

import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modcompile.artifacts import load_with_routers, read_router_config
from modcompile.calibrated_thresholds import check_hard_threshold, parse_threshold, threshold_for
from modcompile.config import GateKind, check
from modcompile.devices import fastest_device
from modcompile.evaluation_text import EvaluationTextConfig, describe_text, load_evaluation_blocks, text_as_json
from modcompile.perplexity import Evaluation, evaluate_model
from modcompile.progress import show_elapsed

_WIDTH = 100


@dataclass(frozen=True)
class DepthEvaluationConfig:
    """How a routed folder is evaluated.

    Raises:
        ConfigError: an option is outside of its range.
    """

    hard_threshold: float | str = field(
        default=0.5,
        metadata={
            "parse": parse_threshold,
            "help": "Hard, a block is executed where a gate is above this. auto: what modcompile.calibrate found "
            "first; auto:0.8: for that budget.",
        },
    )
    batch_size: int = field(default=4, metadata={"help": "Sequences in a call of the model."})

    def __post_init__(self) -> None:
        check_hard_threshold(self.hard_threshold)
        check("batch_size", self.batch_size, at_least=1)


def evaluate_depth(folder: Path, text: EvaluationTextConfig, config: DepthEvaluationConfig) -> dict[str, Any]:
    """Evaluate, print a table, and return what `report.json` is to hold.

    Raises:
        ArtifactError: the folder is missing, incomplete, damaged, or of another version.
        CheckpointError: its base can't be read.
        ConfigError: the sequence length is above the model's positions.
        DataError: the text can't be read, or has fewer than two tokens.
    """
    gate = read_router_config(folder).gate
    thresholds = threshold_for(folder, config.hard_threshold)
    blocks = load_evaluation_blocks(text, folder)
    with show_elapsed("loading and tracing"):
        model = load_with_routers(folder, thresholds, device=fastest_device(), use_cache=False)
    evaluation = evaluate_model(model, blocks, hard_threshold=thresholds, batch_size=config.batch_size)
    print(_table(evaluation, config, gate, text))
    return {
        **text_as_json(text, evaluation.sequences, evaluation.predicted_tokens),
        "hard_threshold": thresholds,
        **{mode: {"perplexity": measured.perplexity, **vars(measured)} for mode, measured in evaluation.modes.items()},
    }


def _table(evaluation: Evaluation, config: DepthEvaluationConfig, gate: GateKind, text: EvaluationTextConfig) -> str:
    """The numbers for a person."""
    by_construction = " (straight_through: 0 or 1, so hard at 0.5 by construction)"
    notes = {
        "dense": "every gate open: the base model",
        "soft": f"gates as trained{by_construction if gate == 'straight_through' else ''}",
        "hard": f"threshold {config.hard_threshold}",
    }
    lines = [describe_text(text, evaluation.sequences, evaluation.predicted_tokens)]
    lines.append(f"{'':5}  {'perplexity':>10}  {'loss':>7}  {'active ratio':>12}")
    for mode, measured in evaluation.modes.items():
        lines.append(
            f"{mode:5}  {measured.perplexity:10.3f}  {measured.loss:7.4f}  {measured.active_ratio:12.3f}  {notes[mode]}"
        )
    ratios = evaluation.hard.active_ratio_per_layer
    layers = "hard active ratio by layer: " + " ".join(f"{layer}:{ratio:.3f}" for layer, ratio in ratios.items())
    return "\n".join([*lines, *textwrap.wrap(layers, _WIDTH, subsequent_indent="  ")])
