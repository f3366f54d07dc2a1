import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from modcompile.errors import ArtifactError, ConfigError
from modcompile.export.session import MODEL_FILE, RoutedSession
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
    assert session.routed_layers == ROUTED_LAYERS
    assert session.num_thresholds == len(ROUTED_LAYERS)


def test_artifact_without_routes(session: RoutedSession, silent_onnx_folder: Path) -> None:
    silent = RoutedSession(silent_onnx_folder / MODEL_FILE, thresholds=[0.0, 2.0])
    assert silent.routed_layers == ()
    assert silent.num_thresholds == len(ROUTED_LAYERS)
    tokens = random_tokens(1, 5).numpy()
    inputs = tokens, np.ones_like(tokens), np.arange(5)[None]
    logits, _, routing = silent.run(*inputs, silent.empty_cache(1))
    assert routing == {}
    session.thresholds = [0.0, 2.0]
    np.testing.assert_array_equal(logits, session.run(*inputs, session.empty_cache(1))[0])


def test_takes_a_number_of_threads(model_file: Path) -> None:
    assert run_whole(RoutedSession(model_file, num_threads=1)) == run_whole(RoutedSession(model_file, num_threads=2))


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
