import re
import sys

import pytest

from modcompile.corpus import Split, builtin_documents
from modcompile.errors import DataError

SPLITS: tuple[Split, ...] = ("train", "validation", "test")


def shingles(documents: list[str], size: int = 10) -> set[tuple[str, ...]]:
    words = [re.findall(r"\w+", document.lower()) for document in documents]
    return {tuple(document[i : i + size]) for document in words for i in range(len(document) - size + 1)}


def test_every_split_is_long_enough_to_train_or_to_measure_on() -> None:
    sizes = {split: sum(map(len, builtin_documents(split))) for split in SPLITS}
    assert sizes["train"] > 200_000
    assert sizes["validation"] > 20_000
    assert sizes["test"] > 20_000


@pytest.mark.parametrize("split", ["validation", "test"])
def test_held_out_text_is_not_in_train(split: Split) -> None:
    train, held_out = builtin_documents("train"), builtin_documents(split)
    paragraphs = {paragraph for document in train for paragraph in document.split("\n\n")}
    assert not paragraphs & {paragraph for document in held_out for paragraph in document.split("\n\n")}
    # Two short topics share turns of phrase with longer ones, so not quite none.
    assert len(shingles(held_out) & shingles(train)) < 0.02 * len(shingles(held_out))


def test_no_paragraph_comes_twice() -> None:
    paragraphs = [p for split in SPLITS for document in builtin_documents(split) for p in document.split("\n\n")]
    assert len(paragraphs) == len(set(paragraphs))


def test_documents_are_prose() -> None:
    text = "\n\n".join(document for split in SPLITS for document in builtin_documents(split))
    for markup in ("::=", ">>>", "****", "====", "+--", "def ", "[1]"):
        assert markup not in text
    letters = sum(1 for character in text if character.isalpha() or character == " ")
    assert letters > 0.9 * len(text)
    assert 'Assignments to "__debug__" are illegal. The value' in text, "a paragraph is one line"
    assert "left-hand side" in text, "a word that was broken at its hyphen is one word again"


def test_a_split_is_the_same_in_every_call() -> None:
    assert builtin_documents("test") == builtin_documents("test")


def test_a_python_without_the_text_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(DataError, match=r"no pydoc_data\.topics.*--train_file"):
        builtin_documents("train")
