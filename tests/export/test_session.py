import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from modcompile.errors import ArtifactError, ConfigError
from modcompile.export.session import MODEL_FILE, RoutedSession
from modcompile.layerwise import LayerwiseQuantizeForCausalLM
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


@pytest.mark.parametrize("thresholds", [-0.1, float("nan"), float("inf"), [0.5], [0.5, 0.5, 0.5], [0.5, -1.0]])
def test_rejects_thresholds(session: RoutedSession, model_file: Path, thresholds: Thresholds) -> None:
    session.thresholds = 0.25
    with pytest.raises(ConfigError, match="threshold"):
        session.thresholds = thresholds
    assert session.thresholds == (0.25, 0.25)
    with pytest.raises(ConfigError, match="threshold"):
        RoutedSession(model_file, thresholds=thresholds)


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


@pytest.mark.parametrize(
    ("bias", "message"),
    [
        ([0.0, 1.0], r"a precision bias must be numbers of shape \(3, 3\)"),
        (np.zeros((2, 3)), r"a precision bias must be numbers of shape \(3, 3\)"),
        (np.zeros((1, 3, 3)), r"a precision bias must be numbers of shape \(3, 3\)"),
        ([[0.0], [0.0, 1.0]], r"a precision bias must be numbers of shape \(3, 3\)"),
        ("high", r"a precision bias must be numbers of shape \(3, 3\)"),
        ([0.0, np.nan, 0.0], "a precision bias holds NaN"),
    ],
)
def test_rejects_a_bias_and_keeps_the_one_before(choosing: RoutedSession, bias: object, message: str) -> None:
    choosing.set_precision_bias([0, 1e4, 0])
    with pytest.raises(ConfigError, match=message):
        choosing.set_precision_bias(bias)
    tokens = random_tokens(1, 5)
    assert {bits for told in told_bits(choosing, tokens, torch.ones_like(tokens)) for bits in told.flatten()} == {4}


@pytest.mark.parametrize("bias", [0.0, [0.0], [0.0, 1.0]])
def test_an_artifact_that_does_not_choose_takes_no_bias(session: RoutedSession, bias: object) -> None:
    own = run_whole(session)
    with pytest.raises(ConfigError, match="that does not choose precisions; leave it out"):
        session.set_precision_bias(bias)
    session.set_precision_bias(None)
    assert run_whole(session) == own


def test_names_the_file_that_it_cannot_run(session: RoutedSession) -> None:
    """Positions that are not there: an error of ours, of one line."""
    tokens = random_tokens(1, 5).numpy()
    with pytest.raises(ArtifactError, match=r"can't run .*model\.onnx: ") as caught:
        session.run(tokens, np.ones((1, 3), np.int64), np.arange(5)[None], session.empty_cache(1))
    assert "\n" not in str(caught.value)


def test_missing_file_says_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"model\.onnx does not exist; make it with python -m modcompile\.export"):
        RoutedSession(tmp_path / MODEL_FILE)


@pytest.mark.parametrize("damage", ["no protobuf", "cut short", "no weights", "weights cut short"])
def test_names_the_file_that_it_cannot_load(model_file: Path, tmp_path: Path, damage: str) -> None:
    copy, weights = tmp_path / MODEL_FILE, tmp_path / f"{MODEL_FILE}.data"
    content = model_file.read_bytes()
    shutil.copy(model_file.with_name(weights.name), weights)
    copy.write_bytes(b"what?" if damage == "no protobuf" else content[:1000] if damage == "cut short" else content)
    if damage == "no weights":
        weights.unlink()
    elif damage == "weights cut short":
        weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ArtifactError, match=r"can't load .*model\.onnx: ") as caught:
        RoutedSession(copy)
    assert "\n" not in str(caught.value)


def test_model_of_another_kind_is_refused(tmp_path: Path) -> None:
    value = onnx.helper.make_tensor_value_info
    tokens, logits = value("input_ids", onnx.TensorProto.FLOAT, [1]), value("logits", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Neg", ["input_ids"], ["logits"])], "g", [tokens], [logits])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, tmp_path / MODEL_FILE)
    with pytest.raises(ArtifactError, match=r"has no (attention_mask|position_ids): it was not made by"):
        RoutedSession(tmp_path / MODEL_FILE)
