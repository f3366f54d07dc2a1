"""The text that a model is evaluated on."""

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset

from modcompile.checkpoint_config import load_config
from modcompile.checkpoint_sources import find_checkpoint
from modcompile.config import check
from modcompile.corpus import Split, builtin_documents
from modcompile.packing import tokenize_and_pack
from modcompile.required_tokenizer import required_tokenizer
from modcompile.text_sources import read_text_file


@dataclass(frozen=True)
class EvaluationTextConfig:
    """Which text, cut how, and how much of it.

    Raises:
        ConfigError: an option is outside of its range.
    """

    text_file: str | None = field(
        default=None,
        metadata={"help": "Text to evaluate on. By default the test split of the built-in data, English prose."},
    )
    sequence_length: int = field(
        default=512, metadata={"help": "Tokens in a sequence; at most the positions of the model."}
    )
    max_samples: int | None = field(
        default=None, metadata={"help": "Evaluate on at most this many sequences, drawn at random from the whole text."}
    )
    seed: int = field(default=42, metadata={"help": "The seed of what is drawn at random."})

    def __post_init__(self) -> None:
        check("sequence_length", self.sequence_length, at_least=2)
        if self.max_samples is not None:
            check("max_samples", self.max_samples, at_least=1)

    @property
    def source(self) -> str:
        """What to call the text."""
        return self.text_file or _builtin("test")


def load_evaluation_blocks(config: EvaluationTextConfig, folder: Path) -> Dataset:
    """The configured text as `tokenize_and_pack` makes sequences of it for the model in `folder`.

    Raises:
        ArtifactError: the folder has no tokenizer.
        CheckpointError: its configuration or tokenizer can't be read.
        ConfigError: the sequence length is above the model's positions.
        DataError: the text can't be read, or has fewer than two tokens.
    """
    if config.text_file is None:
        texts = builtin_documents("test")
    else:
        *blocks, last = read_text_file(config.text_file)
        # A line break at the end joins a block to the next one: a file is one document, here as in training.
        texts = [*(f"{block}\n\n" for block in blocks), last]
    return _draw(_pack(texts, config, folder, config.source), config.max_samples, config.seed)


def load_calibration_blocks(config: EvaluationTextConfig, folder: Path, max_samples: int) -> Dataset:
    """Up to `max_samples` sequences of the same length, drawn from the built-in validation split.

    It shares no paragraph with the test split, which is evaluated on by default.

    Raises:
        As `load_evaluation_blocks`.
    """
    texts = builtin_documents("validation")
    return _draw(_pack(texts, config, folder, _builtin("validation")), max_samples, config.seed)


def describe_text(config: EvaluationTextConfig, sequences: int, predicted_tokens: int) -> str:
    """How much of which text it was, for a person."""
    text = f"{predicted_tokens:,} predicted tokens of {config.source}"
    return f"{text}, {sequences:,} sequences of up to {config.sequence_length}"


def text_as_json(config: EvaluationTextConfig, sequences: int, predicted_tokens: int) -> dict[str, Any]:
    """The same for `report.json`."""
    return {
        "text": config.source,
        "sequence_length": config.sequence_length,
        "sequences": sequences,
        "predicted_tokens": predicted_tokens,
    }


def _pack(texts: list[str], config: EvaluationTextConfig, folder: Path, source: str) -> Dataset:
    positions = getattr(load_config(find_checkpoint(str(folder.resolve())), folder), "max_position_embeddings", None)
    tokenizer = required_tokenizer(folder)
    return tokenize_and_pack(texts, tokenizer, config.sequence_length, max_positions=positions, source=source)


def _draw(sequences: Dataset, max_samples: int | None, seed: int) -> Dataset:
    count = sequences.num_rows
    if max_samples is None or max_samples >= count:
        return sequences
    return sequences.select(sorted(random.Random(seed).sample(range(count), max_samples)))


def _builtin(split: Split) -> str:
    return f"the built-in {split} split"
