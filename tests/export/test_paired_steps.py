from pathlib import Path

import numpy as np
import pytest
import torch

from modcompile.export.depth_subject import DepthSubject
from modcompile.export.paired_steps import PairedStep, paired_steps
from modcompile.export.session import RoutedSession
from modcompile.export.verification_inputs import Case
from modcompile.modeling import RoutedForCausalLM
from tests.export.telling import telling_session
from tests.tiny_routed import ROUTED_LAYERS, tiny_routed

THRESHOLDS = (0.5, 0.5)
ALONE = Case("", THRESHOLDS, ((5, 60, 7, 250),), ((9, 10, 111),))
BATCH = Case("", THRESHOLDS, ((5, 60, 7, 250), (8, 77)), ((9, 10, 111), (12, 13, 14)), "right")


@pytest.fixture(scope="module")
def session(onnx_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> RoutedSession:
    gates = [range(layer, layer + 1) for layer in ROUTED_LAYERS]
    session = telling_session(onnx_folder, tmp_path_factory.mktemp("telling") / "onnx", gates)
    session.thresholds = THRESHOLDS
    return session


@pytest.fixture
def model() -> RoutedForCausalLM:
    model = tiny_routed("straight_through")
    model.set_router_mode(list(THRESHOLDS))
    return model


@torch.no_grad()
def test_runs_a_prefill_and_every_decode_step_with_a_cache(model: RoutedForCausalLM, session: RoutedSession) -> None:
    steps = list(paired_steps(DepthSubject(model), session, ALONE))
    ids = torch.tensor([ALONE.prefills[0] + ALONE.decodes[0]])
    whole = model(ids)
    assert [step.torch_logits.shape[1] for step in steps] == [4, 1, 1, 1]
    for logits in ("torch_logits", "onnx_logits"):
        joined = np.concatenate([getattr(step, logits) for step in steps], 1)
        np.testing.assert_allclose(joined, whole.logits.numpy(), rtol=0, atol=1e-4)
    for routes in ("torch_routes", "onnx_routes"):
        joined = np.concatenate([getattr(step, routes) for step in steps], 2)
        np.testing.assert_array_equal(joined, torch.stack(whole.gates).squeeze(-1).numpy())


@pytest.mark.parametrize("padding", ["left", "right"])
def test_rows_of_a_padded_batch_compute_what_they_compute_alone(
    model: RoutedForCausalLM, session: RoutedSession, padding: str
) -> None:
    batch = Case("", THRESHOLDS, BATCH.prefills, BATCH.decodes, "left" if padding == "left" else "right")
    steps = list(paired_steps(DepthSubject(model), session, batch))
    for row, (prefill, decode) in enumerate(zip(batch.prefills, batch.decodes, strict=True)):
        alone = list(paired_steps(DepthSubject(model), session, Case("", THRESHOLDS, (prefill,), (decode,))))
        for step, single in zip(steps, alone, strict=True):
            tokens = step.tokens[row]
            assert int(tokens.sum()) == single.tokens.size
            for logits in ("torch_logits", "onnx_logits"):
                together, expected = getattr(step, logits)[row, tokens], getattr(single, logits)[0]
                np.testing.assert_allclose(together, expected, rtol=0, atol=1e-4)


def test_each_runtime_is_judged_by_itself(model: RoutedForCausalLM, session: RoutedSession) -> None:
    """The second runtime's routes are not those of the first, nor is its cache."""
    session.thresholds = (2.0, 2.0)
    try:
        steps = list(paired_steps(DepthSubject(model), session, ALONE))
    finally:
        session.thresholds = THRESHOLDS
    assert any(step.torch_routes.any() for step in steps)
    assert not any(step.onnx_routes.any() for step in steps)
    assert all(np.abs(step.torch_logits - step.onnx_logits).max() > 1e-2 for step in steps)


def test_next_tokens_are_those_of_the_text(model: RoutedForCausalLM, session: RoutedSession) -> None:
    steps = list(paired_steps(DepthSubject(model), session, ALONE))
    assert [step.next_tokens.tolist() for step in steps] == [[[60, 7, 250, 9]], [[10]], [[111]], [[]]]
    assert [step.losses()[2] for step in steps] == [4, 1, 1, 0]


def test_losses_are_summed_cross_entropies() -> None:
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(2, 1, 3, 5)).astype(np.float32)
    routes, tokens = np.ones((2, 1, 3), bool), np.ones((1, 3), bool)
    step = PairedStep(logits[0], logits[1], routes, routes, [1, 1], tokens, np.array([[4, 0]]))
    expected = []
    for runtime in logits:
        probabilities = np.exp(runtime[0]) / np.exp(runtime[0]).sum(-1, keepdims=True)
        expected.append(-np.log(probabilities[0, 4]) - np.log(probabilities[1, 0]))
    *losses, count = step.losses()
    assert losses == pytest.approx(expected, abs=1e-5)
    assert count == 2
