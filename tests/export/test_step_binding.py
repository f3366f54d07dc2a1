import numpy as np
import onnxruntime as ort
import pytest

from modcompile.errors import ArtifactError
from modcompile.export.session import MODEL_FILE, RoutedSession
from modcompile.export.step_binding import StepBinding
from tests.export.tiny_in_place import write_in_place_model


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> RoutedSession:
    path = write_in_place_model(tmp_path_factory.mktemp("in_place") / MODEL_FILE)
    return RoutedSession(path, providers=["CPUExecutionProvider"])


def feeds(ids: list[int], length: int, keep: int) -> dict[str, np.ndarray]:
    return {
        "input_ids": np.array([ids]),
        "attention_mask": np.ones((1, length), np.int64),
        "logits_to_keep": np.array([keep]),
    }


def test_past_and_present_may_be_one_memory(session: RoutedSession) -> None:
    """Slots that were filled before stay; those of the new tokens are what a cache that grows has there."""
    cache = session.empty_cache(1, 8)
    for value in cache:
        value.update_inplace(np.full(value.shape(), 7, np.float32))
    binding = StepBinding(session.model, {}, cache, cache)
    binding.run(feeds([5, 6, 7], 3, 1))
    binding.run(feeds([8], 4, 1))
    assert [value.data_ptr() for value in binding.present] == [value.data_ptr() for value in cache]
    ids = np.array([[5, 6, 7, 8]])
    _, grown, _ = session.run(ids, np.ones_like(ids), ids, session.empty_cache(1))
    for value, expected in zip(cache, grown, strict=True):
        np.testing.assert_allclose(value.numpy()[:, :, :4], expected.numpy(), atol=1e-5)
        assert (value.numpy()[:, :, 4:] == 7).all()


def test_without_a_present_the_past_is_left_alone(session: RoutedSession) -> None:
    arrays = [np.zeros((1, 2, 2, 16), np.float32) for _ in range(4)]
    binding = StepBinding(session.model, {}, [ort.OrtValue.ortvalue_from_numpy(array) for array in arrays])
    binding.run(feeds([5], 3, 1))
    assert {tuple(value.shape()) for value in binding.present} == {(1, 2, 3, 16)}
    assert not any(array.any() for array in arrays)


def test_steps_of_one_size_write_to_the_same_memory(session: RoutedSession) -> None:
    cache = session.empty_cache(1, 8)
    binding = StepBinding(session.model, {}, cache, cache)
    first, first_told = binding.run(feeds([40, 6, 7], 3, 2))
    kept = first.copy()
    one, one_told = binding.run(feeds([5], 4, 1))
    assert (first.shape, one.shape) == ((1, 2, 50), (1, 1, 50))
    before = one.copy()
    two, two_told = binding.run(feeds([40], 5, 1))
    assert np.shares_memory(one, two)
    assert np.shares_memory(one_told["routing.0"], two_told["routing.0"])
    assert not np.array_equal(one, before)
    assert two_told["routing.0"].tolist() == [[True]]
    np.testing.assert_array_equal(first, kept)
    assert first_told["routing.0"].tolist() == [[True, False, False]]


@pytest.mark.parametrize("failing", [[9999], [9999, 3]])
def test_goes_on_after_an_error(session: RoutedSession, failing: list[int]) -> None:
    """Of a token that the model does not have, in a step as large as the one before, or larger."""
    cache = session.empty_cache(1, 8)
    binding = StepBinding(session.model, {}, cache, cache)
    binding.run(feeds([5, 6], 2, 1))
    expected = binding.run(feeds([7], 3, 1))[0].copy()
    with pytest.raises(ArtifactError, match="can't run"):
        binding.run(feeds(failing, 3 + len(failing), 1))
    np.testing.assert_array_equal(binding.run(feeds([7], 3, 1))[0], expected)


def test_what_overrides_is_fed_to_every_step(session: RoutedSession) -> None:
    cache = session.empty_cache(1, 8)
    binding = StepBinding(session.model, {"routing_threshold": np.array([0.1])}, cache, cache)
    told = [binding.run(feeds([token], 1 + index, 1))[1]["routing.0"].item() for index, token in enumerate([4, 6, 6])]
    assert told == [False, True, True]
