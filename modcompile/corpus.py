"""The built-in data set: the English prose of Python's language reference, which every machine with Python has.

It comes from `pydoc_data.topics`: one document a topic, without headings, tables, grammar and code. Its text differs a
little from one Python version to the next; what is held out does not depend on anything but a topic's name.
"""

import hashlib
import re
from typing import Literal

from modcompile.errors import DataError

BUILTIN = "builtin"

Split = Literal["train", "validation", "test"]

_BLANK_LINES = re.compile(r"\n\s*\n")
_WRAPPED_HYPHEN = re.compile(r"(?<=[a-z])-\n\s*(?=[a-z])")
_LIST_MARKER = re.compile(r"^(?:[*•]|\d+\.|\[\d+\])\s+")
_FOOTNOTE_MARK = re.compile(r"\s?\[\d+\]")
_EMPHASIS = re.compile(r"(?<!\w)(\*{1,2})([^*\s](?:[^*]*[^*\s])?)\1(?!\w)")
_WORD = re.compile("[\"'(\u201c]*[A-Za-z][a-z]*(?:[\u2019'-][a-z]+)*[\"')\u201d.,:;?!]*")

_MIN_WORDS = 6
_MIN_SHARE_OF_WORDS = 0.7  # the rest is names and literals; code, grammar and tables lie well below


def builtin_documents(split: Split) -> list[str]:
    """The documents of one split, in the order of their topics' names; paragraphs are parted by blank lines.

    A tenth of the topics is held out for validation and another for test. The topics quote each other at length, so
    every paragraph is kept once, in the shortest topic that has it: no held-out paragraph occurs in train.

    Raises:
        DataError: this Python comes without `pydoc_data`.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise DataError(
            "this Python has no pydoc_data.topics, the text of the built-in data set: give --train_file"
        ) from error
    seen: set[str] = set()
    documents = {}
    for name in sorted(topics, key=lambda name: (len(topics[name]), name)):
        paragraphs = [paragraph for paragraph in _prose(topics[name]) if paragraph not in seen]
        seen.update(paragraphs)
        if paragraphs:
            documents[name] = "\n\n".join(paragraphs)
    return [documents[name] for name in sorted(documents) if _split_of(name) == split]


def _split_of(topic: str) -> Split:
    held_out: dict[int, Split] = {0: "validation", 1: "test"}
    return held_out.get(int.from_bytes(hashlib.sha256(topic.encode()).digest()[:8]) % 10, "train")


def _prose(topic: str) -> list[str]:
    paragraphs = (_unwrap(block) for block in _BLANK_LINES.split(topic))
    return list(dict.fromkeys(paragraph for paragraph in paragraphs if _is_prose(paragraph)))


def _unwrap(block: str) -> str:
    """One block of the reference on one line, without list markers, footnote marks and emphasis."""
    line = " ".join(_WRAPPED_HYPHEN.sub("-", block).split())
    return _EMPHASIS.sub(r"\2", _FOOTNOTE_MARK.sub("", _LIST_MARKER.sub("", line)))


def _is_prose(paragraph: str) -> bool:
    words = paragraph.split()
    plain = sum(1 for word in words if _WORD.fullmatch(word))
    return (
        len(words) >= _MIN_WORDS
        and paragraph.rstrip(')"')[-1:] in {".", ":", ";", "?", "!"}
        and "::=" not in paragraph
        and plain >= _MIN_SHARE_OF_WORDS * len(words)
    )
