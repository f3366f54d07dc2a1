"""The texts that quality is measured on: kinds that routers were trained on, and kinds that they were not."""

import hashlib
import json
import sysconfig
from collections.abc import Mapping
from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from modcompile.corpus import builtin_documents
from modcompile.packing import tokenize_and_pack

_CODE = ("argparse.py", "heapq.py", "statistics.py", "textwrap.py", "queue.py", "difflib.py")
"""Modules of Python's standard library, by several authors."""


def standard_texts() -> dict[str, str]:
    """prose: the built-in data's test split; code: from Python's own library; dialogue: written for this."""
    library = Path(sysconfig.get_paths()["stdlib"])
    return {
        "prose": "\n\n".join(builtin_documents("test")),
        "code": "\n\n".join((library / name).read_text(encoding="utf-8") for name in _CODE),
        "dialogue": (Path(__file__).parent / "dialogue.txt").read_text(encoding="utf-8"),
    }


def named_text(given: str) -> tuple[str, str]:
    """The name and the text of a `NAME=PATH`.

    Raises:
        ValueError: it is not of that form.
    """
    name, separator, path = given.partition("=")
    if not (name and separator and path):
        raise ValueError(f"{given!r} is not of the form NAME=PATH")
    return name, Path(path).read_text(encoding="utf-8")


def windows(text: str, tokenizer: PreTrainedTokenizerBase, length: int, most: int) -> Dataset:
    """Up to `most` whole sequences of `length` tokens, evenly spread over the text.

    Raises:
        ValueError: the text is shorter than one.
    """
    blocks = tokenize_and_pack([text], tokenizer, length)
    whole = [index for index in range(blocks.num_rows) if sum(blocks[index]["attention_mask"]) == length]
    if not whole:
        raise ValueError(f"a text is shorter than {length} tokens")
    count = min(most, len(whole))
    return blocks.select([whole[index * len(whole) // count] for index in range(count)])


def digest(blocks: Dataset) -> str:
    """Of the tokens: what was measured on others cannot be compared."""
    return hashlib.sha256(json.dumps(blocks["input_ids"][:]).encode()).hexdigest()


def digests(texts: Mapping[str, Dataset]) -> dict[str, str]:
    """By name."""
    return {name: digest(blocks) for name, blocks in texts.items()}
