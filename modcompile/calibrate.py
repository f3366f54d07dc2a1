"""python -m modcompile.calibrate DIR: find the thresholds at which the routers of a folder spend what they shall.

One training serves a range of budgets: thresholds are found for each --target_active_ratio on a text, without training,
and kept in DIR/thresholds.json. --hard_threshold auto of modcompile.evaluate, generate and export then takes those of
the first budget, auto:0.8 those of the budget 0.8.

Prints a table, and writes what was measured into DIR/report.json under "calibration".
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import get_args

from datasets import Dataset

from modcompile.artifacts import load_with_routers, read_router_config, update_report
from modcompile.calibrated_thresholds import CalibratedThresholds, ThresholdScope, write_thresholds
from modcompile.calibrating import TOLERANCE, calibrate_thresholds
from modcompile.cli import run
from modcompile.config import check, check_choice
from modcompile.devices import fastest_device
from modcompile.errors import ConfigError
from modcompile.evaluation_text import (
    EvaluationTextConfig,
    load_calibration_blocks,
    load_evaluation_blocks,
)
from modcompile.flags import parse_flags
from modcompile.modeling import RoutedForCausalLM
from modcompile.precision_folder import holds_precisions
from modcompile.progress import show_elapsed
from modcompile.reused_memory import reuse_freed_memory
from modcompile.threshold_search import search_thresholds

_SEARCHED = 24  # sequences, unless another number is asked for


@dataclass(frozen=True)
class CalibrationConfig:
    """Which budgets, and on which text.

    Raises:
        ConfigError: an option is outside of its range.
    """

    target_active_ratio: list[float] = field(
        default_factory=lambda: [0.9],
        metadata={"help": "Shares of (token, routed layer) pairs that shall be executed, in [0, 1]."},
    )
    threshold_scope: ThresholdScope = field(
        default="global",
        metadata={
            "help": "global: one threshold for all gates, so that tokens are skipped where routers think that they "
            "matter least. per_layer: each gate executes the same share of tokens. searched: from global on, each "
            "gate's own, moved a step where less is lost for the same work, as measured: minutes a budget."
        },
    )
    text_file: str | None = field(
        default=None,
        metadata={"help": "Text to calibrate on. By default the validation split of the built-in data, English prose."},
    )
    sequence_length: int = field(
        default=512, metadata={"help": "Tokens in a sequence; at most the positions of the model."}
    )
    max_samples: int = field(default=24, metadata={"help": "At most this many sequences, drawn at random."})
    search_samples: int = field(
        default=_SEARCHED,
        metadata={
            "help": "Of the sequences of max_samples, so many, or all, are those whose loss is measured for "
            "--threshold_scope searched; a few are too few. The hidden states between all blocks are held for them: "
            "5 GiB for 24 of 512 tokens, 30 layers of 576."
        },
    )
    batch_size: int = field(default=4, metadata={"help": "Sequences in a call of the model."})
    bf16: bool = field(
        default=False, metadata={"help": "Search with products in bfloat16: faster on GPUs, and on CPUs that have AMX."}
    )
    seed: int = field(default=42, metadata={"help": "The seed of what is drawn at random."})

    def __post_init__(self) -> None:
        for target in self.target_active_ratio:
            check("target_active_ratio", target, at_least=0, at_most=1)
        if len(set(self.target_active_ratio)) < len(self.target_active_ratio):
            raise ConfigError("--target_active_ratio names a budget twice; name each once")
        check_choice("threshold_scope", self.threshold_scope, get_args(ThresholdScope))
        check("sequence_length", self.sequence_length, at_least=2)
        check("max_samples", self.max_samples, at_least=1)
        check("search_samples", self.search_samples, at_least=1)
        if self.search_samples > self.max_samples and self.search_samples != _SEARCHED:
            raise ConfigError(
                f"--search_samples {self.search_samples} are of --max_samples {self.max_samples}; make that as many"
            )
        if self.threshold_scope != "searched" and (self.bf16 or self.search_samples != _SEARCHED):
            raise ConfigError("--search_samples and --bf16 are for a search; add --threshold_scope searched")
        check("batch_size", self.batch_size, at_least=1)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, calibrate, print and write."""
    config, given = parse_flags(
        "modcompile.calibrate",
        __doc__,
        ("folder", "A routed folder with trained routers (modcompile.rewrite, modcompile.train)."),
        (CalibrationConfig,),
        argv,
    )
    folder = Path(given)
    if holds_precisions(folder):
        raise ConfigError(
            f"{folder} has precisions, whose depth gates can't be calibrated; calibrate the routed folder that it was "
            "made from, and give the threshold as a number"
        )
    read_router_config(folder)
    text = EvaluationTextConfig(config.text_file, config.sequence_length, config.max_samples, config.seed)
    blocks = (
        load_calibration_blocks(text, folder, config.max_samples)
        if config.text_file is None
        else load_evaluation_blocks(text, folder)
    )
    with show_elapsed("loading and tracing"):
        model = load_with_routers(folder, device=fastest_device(), use_cache=False)
    found = []
    for target in config.target_active_ratio:
        with show_elapsed(f"calibrating for {target:g}"):
            found.append(_calibrated(model, blocks, target, config))
    write_thresholds(found, folder)
    source = config.text_file or "the built-in validation split"
    tokens = sum(map(sum, blocks["attention_mask"]))
    report = {"text": source, "tokens": tokens, "calibrated": [asdict(each) for each in found]}
    update_report(folder, "calibration", report)
    print(_table(found, f"{tokens:,} tokens of {source}"))


def _calibrated(
    model: RoutedForCausalLM, blocks: Dataset, target: float, config: CalibrationConfig
) -> CalibratedThresholds:
    if config.threshold_scope == "searched":
        few = blocks.select(range(min(config.search_samples, blocks.num_rows)))
        return search_thresholds(model, blocks, target, few, batch_size=config.batch_size, bf16=config.bf16)
    return calibrate_thresholds(model, blocks, target, config.threshold_scope, batch_size=config.batch_size)


def _table(found: Sequence[CalibratedThresholds], text: str) -> str:
    lines = [text, f"{'target':>6}  {'active ratio':>12}  thresholds"]
    for each in found:
        lowest, highest = min(each.thresholds), max(each.thresholds)
        thresholds = f"{lowest:.4f}" if lowest == highest else f"{lowest:.4f} to {highest:.4f}"
        missed = abs(each.active_ratio - each.target_active_ratio) > TOLERANCE
        note = "  not met: many gates say the same" if missed else ""
        lines.append(f"{each.target_active_ratio:6.3f}  {each.active_ratio:12.3f}  {thresholds}{note}")
    return "\n".join(lines)


if __name__ == "__main__":
    reuse_freed_memory()
    sys.exit(run(main))
