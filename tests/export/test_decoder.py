from pathlib import Path

import numpy as np
import pytest

from modcompile.errors import ArtifactError
from modcompile.export.decoder import Decoder
from modcompile.export.session import MODEL_FILE, RoutedSession
from modcompile.export.step_binding import Cache
from tests.export.tiny_in_place import write_in_place_model

VOCAB_SIZE = 50
PROMPT, NEW_TOKENS = 7, 6


@pytest.fixture(scope="module")
def in_place_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_in_place_model(tmp_path_factory.mktemp("in_place") / MODEL_FILE)


@pytest.fixture(params=["growing", "in place"])
def session(request: pytest.FixtureRequest, onnx_folder: Path, in_place_file: Path) -> RoutedSession:
    model_file = in_place_file if request.param == "in place" else onnx_folder / MODEL_FILE
    return RoutedSession(model_file, providers=["CPUExecutionProvider"])


@pytest.fixture
def in_place(in_place_file: Path) -> RoutedSession:
    return RoutedSession(in_place_file, providers=["CPUExecutionProvider"])


def tokens(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(3, VOCAB_SIZE, shape)


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("capacity", [0, PROMPT, PROMPT + NEW_TOKENS, 60])
def test_steps_equal_those_with_a_cache_handed_on(session: RoutedSession, capacity: int, padding: str | None) -> None:
    """The functional path: each step gets the cache that the one before returned. Bit for bit, also as it grows."""
    ids, mask = tokens(2, PROMPT), np.ones((2, PROMPT), np.int64)
    mask[0, {None: slice(0), "left": slice(3), "right": slice(4, None)}[padding]] = 0
    decoder, cache = Decoder(session, 2, capacity), session.empty_cache(2)
    added = mask
    for step in range(NEW_TOKENS + 1):
        positions = (mask.cumsum(1) - 1).clip(0)[:, -ids.shape[1] :]
        expected, cache, expected_told = session.run(ids, mask, positions, cache)
        logits, told = decoder.step(ids, added, logits_to_keep=4)
        np.testing.assert_array_equal(logits, expected[:, -4:])
        assert told.keys() == expected_told.keys() != set()
        for name, array in expected_told.items():
            np.testing.assert_array_equal(told[name], array)
        assert decoder.length == mask.shape[1] == PROMPT + step
        ids = expected[:, -1:].argmax(-1)
        added = np.ones_like(ids)
        mask = np.concatenate([mask, added], 1)


def test_a_mask_is_of_ones_unless_given(session: RoutedSession) -> None:
    ids = tokens(2, PROMPT)
    first, second = Decoder(session, 2, 9), Decoder(session, 2, 9)
    for part in (ids, ids[:, :1]):
        np.testing.assert_array_equal(first.step(part)[0], second.step(part, np.ones_like(part))[0])
    hidden = np.zeros((2, 1), np.int64)
    assert not np.array_equal(first.step(ids[:, :1], hidden)[0], second.step(ids[:, :1])[0])


@pytest.mark.parametrize(("capacity", "expected"), [(13, [13]), (4, [4, 8, 16]), (0, [1, 7, 14])])
def test_memory_is_taken_beforehand_and_doubles(
    in_place: RoutedSession, monkeypatch: pytest.MonkeyPatch, capacity: int, expected: list[int]
) -> None:
    taken = []

    def empty_cache(batch: int, capacity: int) -> Cache:
        taken.append(capacity)
        return RoutedSession.empty_cache(in_place, batch, capacity)

    monkeypatch.setattr(in_place, "empty_cache", empty_cache)
    decoder = Decoder(in_place, 1, capacity)
    for ids in np.split(tokens(1, PROMPT + NEW_TOKENS), range(PROMPT, PROMPT + NEW_TOKENS), axis=1):
        decoder.step(ids)
    assert decoder.length == 13
    assert taken == expected


def test_one_row_takes_several_tokens_after_others(session: RoutedSession) -> None:
    ids = tokens(1, PROMPT)
    whole, _ = Decoder(session, 1, PROMPT).step(ids, logits_to_keep=PROMPT)
    decoder = Decoder(session, 1, PROMPT)
    parts = [decoder.step(part, logits_to_keep=PROMPT)[0].copy() for part in np.split(ids, [1, 3, 4], axis=1)]
    assert [part.shape[1] for part in parts] == [1, 2, 1, 3]
    np.testing.assert_allclose(np.concatenate(parts, 1), whole, atol=1e-4)


def test_what_overrides_may_change_between_steps(session: RoutedSession) -> None:
    ids = tokens(2, PROMPT)
    decoder = Decoder(session, 2, PROMPT + 3)
    for part, threshold in ((ids, 0.0), (ids[:, :1], 2.0), (ids[:, :1], 0.0)):
        session.thresholds = threshold
        _, told = decoder.step(part)
        assert {bool(flag) for mask in told.values() for flag in mask.flatten()} == {threshold == 0}


def test_without_the_input_that_keeps_logits(in_place: RoutedSession, tmp_path: Path) -> None:
    """The last ones are taken of all."""
    keeps_all = RoutedSession(write_in_place_model(tmp_path / MODEL_FILE, keeps_logits=False))
    ids = tokens(2, PROMPT)
    for keep in (1, 3, PROMPT):
        logits, _ = Decoder(keeps_all, 2, PROMPT).step(ids, logits_to_keep=keep)
        assert logits.shape == (2, keep, VOCAB_SIZE)
        np.testing.assert_allclose(logits, Decoder(in_place, 2, PROMPT).step(ids, logits_to_keep=keep)[0], atol=1e-5)


def test_after_an_error_the_rows_are_as_before(session: RoutedSession) -> None:
    """Of a token that the model does not have."""
    ids = tokens(1, PROMPT)
    decoder = Decoder(session, 1, PROMPT + 2)
    decoder.step(ids)
    with pytest.raises(ArtifactError, match=r"can't run .*model\.onnx: "):
        decoder.step(np.array([[100_000]]))
    assert decoder.length == PROMPT
    logits, _ = decoder.step(ids[:, :1])
    undisturbed = Decoder(session, 1, PROMPT + 2)
    undisturbed.step(ids)
    np.testing.assert_array_equal(logits, undisturbed.step(ids[:, :1])[0])


def test_several_tokens_after_others_are_for_one_row(in_place: RoutedSession) -> None:
    decoder = Decoder(in_place, 2, PROMPT)
    decoder.step(tokens(2, 3))
    with pytest.raises(ArtifactError, match="batch_size must be 1 when sequence_length > 1 and past context is given"):
        decoder.step(tokens(2, 2))
