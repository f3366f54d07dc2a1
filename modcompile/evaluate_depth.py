"""The evaluation of a routed folder: perplexity, loss and active ratio on a text, dense, soft and hard."""

import textwrap
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from modcompile.artifacts import load_with_routers, read_router_config
from modcompile.calibrated_thresholds import check_hard_threshold, parse_threshold, threshold_for
from modcompile.config import RouterConfig, check
from modcompile.depth_sweep import DENSE, ROUTER, WAYS, Sweep, sweep_depth
from modcompile.devices import fastest_device
from modcompile.errors import ConfigError
from modcompile.evaluation_text import (
    EvaluationTextConfig,
    describe_text,
    load_calibration_blocks,
    load_evaluation_blocks,
    text_as_json,
)
from modcompile.folders_beside import measure_beside
from modcompile.granularity import label_of
from modcompile.perplexity import Evaluation, Measurement, evaluate_model
from modcompile.progress import show_elapsed
from modcompile.required_tokenizer import required_tokenizer
from modcompile.route_map import find_routes, plot_routes
from modcompile.sweep_plot import plot_sweep
from modcompile.sweep_speed import SweepSpeed
from modcompile.sweep_table import sweep_table

_WIDTH = 100
_DECODED_TEXTS = 2
SWEEP_PLOT, ROUTES_PLOT = "sweep.png", "routes.png"


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
    sweep: bool = field(
        default=False,
        metadata={
            "help": "Also measure what the routers lose at each of sweep_active_ratios, beside the best gates to close "
            "for all tokens, and random ones; plotted in DIR/sweep.png."
        },
    )
    sweep_active_ratios: list[float] = field(
        default_factory=lambda: [0.95, 0.9, 0.8, 0.7],
        metadata={"help": "Shares of (token, routed layer) pairs, in [0, 1]."},
    )
    sweep_samples: int = field(
        default=8,
        metadata={
            "help": "In a sweep, thresholds and gates are chosen on so many sequences of the built-in validation split."
        },
    )
    sweep_speed: bool = field(
        default=False,
        metadata={
            "help": "In a sweep, also measure how many tokens a second DIR/onnx decodes at each point of the routers "
            "and of the best gates to close, and with all gates open (an export without gates is faster than that). It "
            "must have all gates (modcompile.export --fold_gates none)."
        },
    )
    static_candidates: int = field(
        default=6,
        metadata={"help": "In a sweep, how many gates are tried for each further one to close; the cheapest alone."},
    )

    beside: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Other routed folders of the same base, such as one trained with --static_selection_samples, to "
            "measure on the same text at a threshold of 0.5, and show beside this one."
        },
    )
    route_map_tokens: int = field(
        default=0,
        metadata={
            "help": "Draw which layers so many tokens of the first sequence used, at the hard threshold, with the text "
            "along it, in DIR/routes.png."
        },
    )

    def __post_init__(self) -> None:
        check("route_map_tokens", self.route_map_tokens, at_least=0)
        for ratio in self.sweep_active_ratios:
            check("sweep_active_ratios", ratio, at_least=0, at_most=1)
        check("sweep_samples", self.sweep_samples, at_least=1)
        check("static_candidates", self.static_candidates, at_least=1)
        if self.sweep_speed and not self.sweep:
            raise ConfigError("--sweep_speed is of the points of a sweep; add --sweep")
        for name in self.beside:
            if name in WAYS:
                raise ConfigError(f"--beside {name} is also what a sweep calls a way of skipping; give ./{name}")
        check_hard_threshold(self.hard_threshold)
        check("batch_size", self.batch_size, at_least=1)


def evaluate_depth(folder: Path, text: EvaluationTextConfig, config: DepthEvaluationConfig) -> dict[str, Any]:
    """Evaluate, print a table, and return what `report.json` is to hold.

    Raises:
        ArtifactError: the folder is missing, incomplete, damaged, or of another version; or lacks what is to be timed.
        CheckpointError: its base can't be read.
        ConfigError: the sequence length is above the model's positions, a folder beside it has another base, or gates
            of what is to be timed are folded.
        DataError: the text can't be read, or has fewer than two tokens.
    """
    router = read_router_config(folder)
    thresholds = threshold_for(folder, config.hard_threshold)
    blocks = load_evaluation_blocks(text, folder)
    with show_elapsed("loading and tracing"):
        model = load_with_routers(folder, thresholds, device=fastest_device(), use_cache=False)
    # Before minutes of work: whether there is what is to be measured.
    decoded = [_tokens(blocks[row]) for row in range(min(_DECODED_TEXTS, blocks.num_rows))]
    speed = SweepSpeed(folder, len(model.gated_layers), decoded) if config.sweep_speed else None
    others = measure_beside(config.beside, model, blocks, batch_size=config.batch_size)
    evaluation = evaluate_model(model, blocks, hard_threshold=thresholds, batch_size=config.batch_size)
    print(_table(evaluation, config, router, text))
    if config.route_map_tokens:
        ids = _tokens(blocks[0])[: config.route_map_tokens]
        plot_routes(find_routes(model, required_tokenizer(folder), ids, thresholds), folder / ROUTES_PLOT)
        print(f"routes of {len(ids)} tokens plotted in {folder / ROUTES_PLOT}")
    swept: dict[str, Any] = {}
    sweep = Sweep(evaluation.dense, {ROUTER: [evaluation.hard]})
    if config.sweep:
        calibration = load_calibration_blocks(text, folder, config.sweep_samples)
        sweep = sweep_depth(
            model,
            blocks,
            calibration,
            config.sweep_active_ratios,
            candidates=config.static_candidates,
            batch_size=config.batch_size,
            seed=text.seed,
        )
        if speed is not None:
            with show_elapsed("measuring speeds"):
                dense = [[0.0] * len(model.gated_layers)]
                sweep = replace(sweep, speeds=speed.measure({DENSE: dense, **sweep.thresholds}))
    sweep = replace(sweep, ways=sweep.ways | {name: [measured] for name, measured in others.items()})
    if config.sweep or config.beside:
        print(sweep_table(sweep))
        plot_sweep(sweep, folder / SWEEP_PLOT)
        print(f"plotted in {folder / SWEEP_PLOT}")
        swept = {"sweep": {name: [_as_json(point) for point in points] for name, points in sweep.ways.items()}}
        swept |= {"tokens_per_second": sweep.speeds} if sweep.speeds else {}
    return {
        **swept,
        **text_as_json(text, evaluation.sequences, evaluation.predicted_tokens),
        "hard_threshold": thresholds,
        **{mode: _as_json(measured) for mode, measured in evaluation.modes.items()},
    }


def _tokens(row: dict[str, Any]) -> list[int]:
    """Those of a row, padding left out."""
    return list(row["input_ids"][: sum(row["attention_mask"])])


def _as_json(measured: Measurement) -> dict[str, Any]:
    return {"perplexity": measured.perplexity, **vars(measured)}


def _table(
    evaluation: Evaluation, config: DepthEvaluationConfig, router: RouterConfig, text: EvaluationTextConfig
) -> str:
    """The numbers for a person."""
    gate, granularity, threshold = router.gate, router.granularity, config.hard_threshold
    by_construction = " (straight_through: 0 or 1, so hard at 0.5 by construction)"
    notes = {
        "dense": "every gate open: the base model",
        "soft": f"gates as trained{by_construction if gate == 'straight_through' else ''}",
        "hard": f"threshold {threshold if isinstance(threshold, str) else format(threshold, 'g')}",
    }
    lines = [describe_text(text, evaluation.sequences, evaluation.predicted_tokens)]
    lines.append(f"{'':5}  {'perplexity':>10}  {'loss':>7}  {'active ratio':>12}  {'block work':>10}")
    for mode, measured in evaluation.modes.items():
        work = f"{measured.active_ratio:12.3f}  {measured.block_work:10.3f}"
        lines.append(f"{mode:5}  {measured.perplexity:10.3f}  {measured.loss:7.4f}  {work}  {notes[mode]}")
    ratios = {label_of(layer, granularity): ratio for layer, ratio in evaluation.hard.active_ratio_per_layer.items()}
    layers = "hard active ratio by layer: " + " ".join(f"{layer}:{ratio:.3f}" for layer, ratio in ratios.items())
    return "\n".join([*lines, *textwrap.wrap(layers, _WIDTH, subsequent_indent="  ")])
