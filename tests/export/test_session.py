import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from modcompile.errors import ArtifactError
from modcompile.export.session import MODEL_FILE, RoutedSession
from modcompile.layerwise import LayerwiseQuantizeForCausalLM
from tests.export.tiny_in_place import write_in_place_model
from tests.tiny_quantized import BITS, NUM_LAYERS
from tests.tiny_routed import ROUTED_LAYERS, tiny_routed

Thresholds = float | Sequence[float] | None

VOCAB_SIZE = 300
ATOL = 1e-5


@pytest.fixture(scope="module")
def model_file(onnx_folder: Path) -> Path:
    return onnx_folder / MODEL_FILE


@pytest.fixture
def session(model_file: Path) -> RoutedSession:
    return RoutedSession(model_file, providers=["CPUExecutionProvider"])


def random_tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(VOCAB_SIZE, (batch, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("thresholds", [None, 0.0, 0.4, 2.0, [0.0, 2.0], (2.0, 0.0)])
def test_steps_equal_the_hard_graph(session: RoutedSession, thresholds: Thresholds) -> None:
    """A left-padded prefill and decode steps, each runtime with its own cache."""
    model = tiny_routed("straight_through")
    model.set_router_mode(0.5 if thresholds is None else thresholds)
    session.thresholds = thresholds
    tokens = random_tokens(2, 12)
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache, onnx_cache, start = None, session.empty_cache(2), 0
    for stop in (8, 9, 11, 12):
        step = tokens[:, start:stop], mask[:, :stop], positions[:, start:stop]
        output = model(*step, cache, use_cache=True)
        input_ids, attention_mask, position_ids = (tensor.numpy() for tensor in step)
        logits, onnx_cache, routing = session.run(input_ids, attention_mask, position_ids, onnx_cache)
        is_token = mask[:, start:stop].bool()
        torch.testing.assert_close(torch.from_numpy(logits)[is_token], output.logits[is_token], rtol=0, atol=ATOL)
        for actual, expected in zip(routing.values(), output.gates, strict=True):
            assert actual.dtype == np.bool_
            np.testing.assert_array_equal(actual, expected.squeeze(-1).numpy())
        assert {tuple(value.shape()) for value in onnx_cache} == {(2, 2, stop, 8)}
        cache, start = output.past_key_values, stop


def run_whole(session: RoutedSession) -> list[list[list[bool]]]:
    tokens = random_tokens(1, 10).numpy()
    _, _, routing = session.run(tokens, np.ones_like(tokens), np.arange(10)[None], session.empty_cache(1))
    return [mask.tolist() for mask in routing.values()]


def test_thresholds_override_and_leave_the_artifact(session: RoutedSession, model_file: Path) -> None:
    own = run_whole(session)
    assert session.thresholds is None
    session.thresholds = 0
    assert session.thresholds == (0.0, 0.0)
    assert run_whole(session) == [[[True] * 10]] * 2 != own
    session.thresholds = [2, 0]
    assert run_whole(session) == [[[False] * 10], [[True] * 10]]
    session.thresholds = None
    assert run_whole(session) == own
    assert run_whole(RoutedSession(model_file, thresholds=0.5)) == own


def test_tells_its_routed_layers(session: RoutedSession) -> None:
    assert session.gated_layers == tuple(range(layer, layer + 1) for layer in ROUTED_LAYERS)
    assert session.num_thresholds == len(ROUTED_LAYERS)


def test_artifact_without_routes(session: RoutedSession, silent_onnx_folder: Path) -> None:
    silent = RoutedSession(silent_onnx_folder / MODEL_FILE, thresholds=[0.0, 2.0])
    assert silent.gated_layers == ()
    assert silent.num_thresholds == len(ROUTED_LAYERS)
    tokens = random_tokens(1, 5).numpy()
    inputs = tokens, np.ones_like(tokens), np.arange(5)[None]
    logits, _, routing = silent.run(*inputs, silent.empty_cache(1))
    assert routing == {}
    session.thresholds = [0.0, 2.0]
    np.testing.assert_array_equal(logits, session.run(*inputs, session.empty_cache(1))[0])


def test_takes_a_number_of_threads(model_file: Path) -> None:
    assert run_whole(RoutedSession(model_file, num_threads=1)) == run_whole(RoutedSession(model_file, num_threads=2))


@pytest.fixture
def choosing(precision_onnx_folder: Path) -> RoutedSession:
    """Of an artifact that chooses precisions and tells them."""
    return RoutedSession(precision_onnx_folder / MODEL_FILE, providers=["CPUExecutionProvider"])


def told_bits(session: RoutedSession, tokens: torch.Tensor, mask: torch.Tensor) -> list[np.ndarray]:
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = session.empty_cache(len(tokens))
    _, _, told = session.run(tokens.numpy(), mask.numpy(), positions.numpy(), cache)
    assert list(told) == [f"precision.{layer}" for layer in range(NUM_LAYERS)]
    return list(told.values())


def test_tells_which_layers_choose_precisions(choosing: RoutedSession, session: RoutedSession) -> None:
    assert (choosing.precision_layers, choosing.gated_layers) == ((0, 1, 2), ())
    assert (choosing.bias_shape, choosing.num_thresholds) == ((NUM_LAYERS, len(BITS)), 0)
    assert (session.precision_layers, session.bias_shape) == ((), (0, 0))


@pytest.mark.parametrize("bias", [None, [[0.0, 0.3, -0.3]] * 2 + [[-9.0, 0.0, 0.0]]], ids=["own", "biased"])
def test_told_bits_are_those_of_pytorch(
    choosing: RoutedSession, precision_onnx_folder: Path, bias: list[list[float]] | None
) -> None:
    model = LayerwiseQuantizeForCausalLM.from_quantized(precision_onnx_folder.parent)
    if bias is not None:
        model.set_precision_bias(torch.tensor(bias))
    choosing.set_precision_bias(bias)
    found = set()
    for row in range(8):
        tokens = torch.randint(VOCAB_SIZE, (2, 6), generator=torch.Generator().manual_seed(row))
        mask = torch.ones_like(tokens)
        mask[0, :2] = 0
        expected = model.infer_forward(tokens, mask).num_bits
        assert expected is not None
        for told, of_layer in zip(told_bits(choosing, tokens, mask), expected, strict=True):
            assert told.dtype == np.int64
            np.testing.assert_array_equal(told, of_layer.numpy())
            found |= set(told.flatten().tolist())
    assert len(found) > 1


@pytest.mark.parametrize(
    ("bias", "expected"),
    [
        (np.array([np.inf, 0, 0]), [2, 2, 2]),
        ([0, 0, 1e4], [16, 16, 16]),
        ([[0, 1e4, 0]], [4, 4, 4]),
        ([[0, 1e4, 0], [1e4, 0, 0], [0, 0, 1e4]], [4, 2, 16]),
    ],
    ids=["infinity", "row", "matrix of a row", "matrix"],
)
def test_a_bias_forces_precisions(choosing: RoutedSession, bias: object, expected: list[int]) -> None:
    tokens = random_tokens(2, 5)
    own = told_bits(choosing, tokens, torch.ones_like(tokens))
    choosing.set_precision_bias(bias)
    forced = told_bits(choosing, tokens, torch.ones_like(tokens))
    assert [set(bits.flatten().tolist()) for bits in forced] == [{bits} for bits in expected]
    choosing.set_precision_bias(None)
    np.testing.assert_array_equal(told_bits(choosing, tokens, torch.ones_like(tokens)), own)


def test_a_bias_of_one_number_changes_nothing(choosing: RoutedSession) -> None:
    tokens = random_tokens(1, 5)
    own = told_bits(choosing, tokens, torch.ones_like(tokens))
    choosing.set_precision_bias(7.0)
    np.testing.assert_array_equal(told_bits(choosing, tokens, torch.ones_like(tokens)), own)


def test_positions_are_left_out_where_the_model_has_none(tmp_path: Path) -> None:
    """They follow from the mask there; and its cache may grow, too."""
    session = RoutedSession(write_in_place_model(tmp_path / MODEL_FILE), providers=["CPUExecutionProvider"])
    tokens = np.arange(6)[None]
    whole, _, _ = session.run(tokens, np.ones_like(tokens), np.full((1, 6), 99), session.empty_cache(1))
    assert whole.shape == (1, 6, 50)
    cache = session.empty_cache(1)
    for stop in range(1, 7):
        step, mask = tokens[:, stop - 1 : stop], np.ones((1, stop), np.int64)
        logits, longer, _ = session.run(step, mask, np.zeros((1, 1), np.int64), cache)
        np.testing.assert_allclose(logits[0, 0], whole[0, stop - 1], atol=1e-4)
        assert {value.shape()[2] for value in longer} == {stop}
        assert {value.shape()[2] for value in cache} == {stop - 1}
        cache = longer


def test_an_empty_cache_may_have_room(session: RoutedSession) -> None:
    assert {tuple(value.shape()) for value in session.empty_cache(3)} == {(3, 2, 0, 8)}
    assert {tuple(value.shape()) for value in session.empty_cache(3, 5)} == {(3, 2, 5, 8)}
    assert len(session.empty_cache(3)) == 6


def test_names_the_file_that_it_cannot_run(session: RoutedSession) -> None:
    """Positions that are not there: an error of ours, of one line."""
    tokens = random_tokens(1, 5).numpy()
    with pytest.raises(ArtifactError, match=r"can't run .*model\.onnx: ") as caught:
        session.run(tokens, np.ones((1, 3), np.int64), np.arange(5)[None], session.empty_cache(1))
    assert "\n" not in str(caught.value)


def test_a_session_loads_no_pytorch() -> None:
    """Which would take 190 MiB and a second or two in whatever serves the model."""
    modules = "modcompile.export.session, modcompile.export.decoder, modcompile.export.huge_pages"
    code = f"import sys, {modules}; print(sorted({{'torch', 'transformers'}} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
