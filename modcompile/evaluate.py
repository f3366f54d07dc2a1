"""python -m modcompile.evaluate DIR: perplexity, loss and active ratio on a text, dense, soft and hard.

Prints a table, and writes the numbers into DIR/report.json under "evaluation".
"""

import random
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from modcompile.artifacts import load_with_routers, read_router_config, update_report
from modcompile.checkpoint_config import load_config
from modcompile.checkpoint_sources import find_checkpoint
from modcompile.cli import run
from modcompile.config import GateKind, check, check_threshold
from modcompile.corpus import builtin_documents
from modcompile.flags import parse_flags
from modcompile.packing import tokenize_and_pack
from modcompile.perplexity import Evaluation, evaluate_model
from modcompile.progress import show_elapsed
from modcompile.required_tokenizer import required_tokenizer
from modcompile.text_sources import read_text_file
from modcompile.version import __version__

_WIDTH = 100


@dataclass(frozen=True)
class EvaluateConfig:
    """On what a routed folder is evaluated, and how.

    Raises:
        ConfigError: an option is outside of its range.
    """

    hard_threshold: float = field(
        default=0.5, metadata={"help": "Hard, a block is executed where a gate is above this."}
    )
    text_file: str | None = field(
        default=None,
        metadata={"help": "Text to evaluate on. By default the test split of the built-in data, English prose."},
    )
    sequence_length: int = field(
        default=512, metadata={"help": "Tokens in a sequence; at most the positions of the model."}
    )
    batch_size: int = field(default=4, metadata={"help": "Sequences in a call of the model."})
    max_samples: int | None = field(
        default=None, metadata={"help": "Evaluate on at most this many sequences, drawn at random from the whole text."}
    )
    seed: int = field(default=42, metadata={"help": "The seed of what --max_samples draws."})

    def __post_init__(self) -> None:
        check_threshold(self.hard_threshold)
        check("sequence_length", self.sequence_length, at_least=2)
        check("batch_size", self.batch_size, at_least=1)
        if self.max_samples is not None:
            check("max_samples", self.max_samples, at_least=1)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, evaluate, print and write."""
    config, given = parse_flags(
        "modcompile.evaluate",
        __doc__,
        ("folder", "A routed folder, as modcompile.rewrite and modcompile.train write it."),
        (EvaluateConfig,),
        argv,
    )
    folder = Path(given)
    gate = read_router_config(folder).gate
    model_config = load_config(find_checkpoint(str(folder.resolve())), folder)
    positions = getattr(model_config, "max_position_embeddings", None)
    blocks = load_evaluation_blocks(config, required_tokenizer(folder), max_positions=positions)
    with show_elapsed("loading and tracing"):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = load_with_routers(folder, config.hard_threshold, device=device, use_cache=False)
    evaluation = evaluate_model(model, blocks, hard_threshold=config.hard_threshold, batch_size=config.batch_size)
    print(_table(evaluation, config, gate))
    update_report(folder, "evaluation", _as_json(evaluation, config))


def load_evaluation_blocks(
    config: EvaluateConfig, tokenizer: PreTrainedTokenizerBase, *, max_positions: int | None = None
) -> Dataset:
    """The configured text as `tokenize_and_pack` makes sequences of it.

    Raises:
        ConfigError: the sequence length is above the model's positions.
        DataError: the text can't be read, or has fewer than two tokens.
    """
    if config.text_file is None:
        texts = builtin_documents("test")
    else:
        *blocks, last = read_text_file(config.text_file)
        # A line break at the end joins a block to the next one: a file is one document, here as in training.
        texts = [*(f"{block}\n\n" for block in blocks), last]
    sequences = tokenize_and_pack(
        texts, tokenizer, config.sequence_length, max_positions=max_positions, source=_source(config)
    )
    count = sequences.num_rows
    if config.max_samples is None or config.max_samples >= count:
        return sequences
    return sequences.select(sorted(random.Random(config.seed).sample(range(count), config.max_samples)))


def _source(config: EvaluateConfig) -> str:
    return config.text_file or "the built-in test split"


def _table(evaluation: Evaluation, config: EvaluateConfig, gate: GateKind) -> str:
    """The numbers for a person."""
    by_construction = " (straight_through: 0 or 1, so hard at 0.5 by construction)"
    notes = {
        "dense": "every gate open: the base model",
        "soft": f"gates as trained{by_construction if gate == 'straight_through' else ''}",
        "hard": f"threshold {config.hard_threshold:g}",
    }
    text = f"{evaluation.predicted_tokens:,} predicted tokens of {_source(config)}"
    lines = [f"{text}, {evaluation.sequences:,} sequences of up to {config.sequence_length}"]
    lines.append(f"{'':5}  {'perplexity':>10}  {'loss':>7}  {'active ratio':>12}")
    for mode, measured in evaluation.modes.items():
        lines.append(
            f"{mode:5}  {measured.perplexity:10.3f}  {measured.loss:7.4f}  {measured.active_ratio:12.3f}  {notes[mode]}"
        )
    ratios = evaluation.hard.active_ratio_per_layer
    layers = "hard active ratio by layer: " + " ".join(f"{layer}:{ratio:.3f}" for layer, ratio in ratios.items())
    return "\n".join([*lines, *textwrap.wrap(layers, _WIDTH, subsequent_indent="  ")])


def _as_json(evaluation: Evaluation, config: EvaluateConfig) -> dict[str, Any]:
    """What `report.json` holds of an evaluation."""
    return {
        "text": _source(config),
        "sequence_length": config.sequence_length,
        "sequences": evaluation.sequences,
        "predicted_tokens": evaluation.predicted_tokens,
        "hard_threshold": config.hard_threshold,
        **{mode: {"perplexity": measured.perplexity, **vars(measured)} for mode, measured in evaluation.modes.items()},
        "versions": {"modcompile": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
    }


if __name__ == "__main__":
    sys.exit(run(main))
