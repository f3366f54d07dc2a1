from collections.abc import Iterator

import numpy as np
import pytest
import torch

from modcompile.config import RouterConfig
from modcompile.export.verification_inputs import NUM_DECODE_STEPS, NUM_TEXTS, Case, verification_cases
from modcompile.modeling import RoutedForCausalLM
from modcompile.routed_graph import build_routed
from tests.tiny_routed import tiny_base, tiny_routed

TEXTS = [[(row * 37 + index * 11) % 300 for index in range(100)] for row in range(8)]
OWN = [0.25, 0.75]


@pytest.fixture
def model() -> Iterator[RoutedForCausalLM]:
    model = tiny_routed("straight_through")
    model.set_router_mode(OWN)
    yield model
    model.set_router_mode(None)


@pytest.fixture
def cases(model: RoutedForCausalLM) -> list[Case]:
    return verification_cases(model, TEXTS, OWN)


def test_eight_texts_of_mixed_length_go_through_prefill_and_sixteen_steps(cases: list[Case]) -> None:
    alone = [case for case in cases if len(case.prefills) == 1]
    assert len(alone) == NUM_TEXTS == 8
    assert NUM_DECODE_STEPS == 16
    assert len({len(case.prefills[0]) for case in alone}) == 8
    assert min(len(case.prefills[0]) for case in alone) == 1
    for case, text in zip(alone, TEXTS, strict=True):
        (prefill,), (decode,) = case.prefills, case.decodes
        assert len(decode) == NUM_DECODE_STEPS
        assert [*prefill, *decode] == text[: len(prefill) + len(decode)]
        assert case.thresholds == tuple(OWN)


def test_batches_hold_the_same_texts_padded_on_either_side(cases: list[Case]) -> None:
    alone, batches = cases[:NUM_TEXTS], cases[NUM_TEXTS:]
    assert {case.padding for case in batches} == {"left", "right"}
    for case in batches:
        assert case.prefills == tuple(single.prefills[0] for single in alone)
        assert case.decodes == tuple(single.decodes[0] for single in alone)


def test_thresholds_execute_all_skip_all_and_mix(cases: list[Case]) -> None:
    thresholds = {case.name: case.thresholds for case in cases}
    assert thresholds["all executed"] == (0.0, 0.0)
    assert all(0 < threshold < 1e-20 for threshold in thresholds["all but padding executed"])
    assert thresholds["all skipped"] == (2.0, 2.0)
    assert thresholds["every other one"] == (0.0, 2.0)
    assert thresholds["own thresholds, batch"] == tuple(OWN)


def test_prefills_are_padded_on_their_side() -> None:
    sides = {}
    for side in ("left", "right"):
        ids, mask = Case("", (), ((5, 6, 7), (8,)), ((), ()), side).prefill_arrays()
        assert ids.dtype == mask.dtype == np.int64
        sides[side] = ids.tolist(), mask.tolist()
    assert sides["left"] == ([[5, 6, 7], [0, 0, 8]], [[1, 1, 1], [0, 0, 1]])
    assert sides["right"] == ([[5, 6, 7], [8, 0, 0]], [[1, 1, 1], [1, 0, 0]])


def test_a_short_text_is_repeated(model: RoutedForCausalLM) -> None:
    cases = verification_cases(model, [[7, 8, 9]] * 8, OWN)
    (prefill,), (decode,) = cases[7].prefills, cases[7].decodes
    assert len(prefill) + len(decode) == 64 + NUM_DECODE_STEPS
    assert (prefill + decode)[:7] == (7, 8, 9, 7, 8, 9, 7)


@pytest.mark.parametrize("positions", [2, 16, 17, 40, 80])
def test_stays_within_the_positions_of_the_model(
    model: RoutedForCausalLM, positions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.config, "max_position_embeddings", positions)
    lengths = [
        (len(prefill), len(decode))
        for case in verification_cases(model, TEXTS, OWN)
        for prefill, decode in zip(case.prefills, case.decodes, strict=True)
    ]
    assert max(sum(pair) for pair in lengths) <= positions
    assert min(min(pair) for pair in lengths) >= 1


@torch.no_grad()
def test_one_case_executes_about_half_of_the_tokens(model: RoutedForCausalLM, cases: list[Case]) -> None:
    (case,) = (case for case in cases if case.name == "half of the tokens")
    model.set_router_mode(case.thresholds)
    executed = [0, 0]
    for prefill in case.prefills:
        for layer, gate in enumerate(model(torch.tensor([prefill])).gates or ()):
            executed[layer] += int(gate.sum())
    tokens = sum(map(len, case.prefills))
    assert 0.25 * tokens < executed[0] < 0.75 * tokens
    assert 0 < executed[1] < tokens


def test_no_threshold_lies_on_a_gate_of_an_untrained_router() -> None:
    """All its gates are equal, so no threshold splits them, and rounding would decide at one that is equal too."""
    untrained = build_routed(tiny_base(), RouterConfig(router_hidden_size=8, router_pattern="every_other"))
    biases = [router.get_parameter("bias").detach() for router in untrained.routers.values()]
    (gate,) = {float(bias.sigmoid()) for bias in biases}
    cases = verification_cases(untrained, TEXTS, [0.5, 0.5])
    assert all(abs(threshold - gate) > 0.04 for case in cases for threshold in case.thresholds)


def test_leaves_the_model_in_its_mode(model: RoutedForCausalLM, cases: list[Case]) -> None:
    assert cases
    assert model.hard_thresholds == OWN
    model.set_router_mode(None)
    verification_cases(model, TEXTS, OWN)
    assert model.hard_thresholds is None
