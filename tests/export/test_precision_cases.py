import json
import math
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import nn

from modcompile.config import RouterConfig
from modcompile.errors import VerificationError
from modcompile.export.precision_cases import precision_cases
from modcompile.export.verification_inputs import NUM_TEXTS, Case
from modcompile.layerwise import LayerwiseQuantizeForCausalLM
from modcompile.routers import DepthRouter
from tests.tiny_quantized import BITS, NUM_LAYERS, let_routers_decide

TEXTS = [[(row * 37 + index * 11) % 300 for index in range(100)] for row in range(NUM_TEXTS)]
DEPTH = RouterConfig(router_hidden_size=8, router_pattern="every_other")
GATED = (0, 2)
THRESHOLD = 0.4
FORCED = ["own decisions, batch", *(f"all at {bits} bits" for bits in BITS), "another one in each layer"]


def layerwise(folder: Path, scope: str, depth: RouterConfig | None) -> LayerwiseQuantizeForCausalLM:
    model = LayerwiseQuantizeForCausalLM.from_quantized(folder, depth=depth, router_scope=scope)
    if depth is not None:
        model.set_hard_threshold(THRESHOLD)
    return model


@pytest.fixture(scope="module", params=["sequence", "token"])
def scope(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=[None, DEPTH], ids=["without gates", "gates"])
def model(request: pytest.FixtureRequest, quantized_folder: Path, scope: str) -> LayerwiseQuantizeForCausalLM:
    model = layerwise(quantized_folder, scope, request.param)
    let_routers_decide(model)
    return model


@pytest.fixture(scope="module")
def cases(model: LayerwiseQuantizeForCausalLM) -> list[Case]:
    return precision_cases(model, TEXTS, THRESHOLD)


def bits_of(model: LayerwiseQuantizeForCausalLM, case: Case) -> list[torch.Tensor]:
    """By layer, what the tokens of the prefill get in PyTorch when it is forced as the case says."""
    if case.thresholds:
        model.set_hard_threshold(case.thresholds)
    model.set_precision_bias(torch.tensor(case.precision_bias))
    ids, mask = map(torch.from_numpy, case.prefill_arrays())
    output = model.infer_forward(ids, mask)
    model.set_precision_bias(None)
    if case.thresholds:
        model.set_hard_threshold(THRESHOLD)
    assert output.num_bits is not None
    return [bits[mask.bool()] for bits in output.num_bits]


def test_own_decisions_come_first(model: LayerwiseQuantizeForCausalLM, cases: list[Case]) -> None:
    """Each row alone, so that what is told of them is what the artifact does by itself."""
    assert [case.name for case in cases[:NUM_TEXTS]] == ["own decisions, row by row"] * NUM_TEXTS
    gated = len(model.depth_routers)
    for case in cases[: NUM_TEXTS + 1]:
        assert case.thresholds == (THRESHOLD,) * gated
        assert case.precision_bias == ((0.0,) * len(BITS),) * NUM_LAYERS
    for row, case in enumerate(cases[:NUM_TEXTS]):
        (prefill,), (decode,) = case.prefills, case.decodes
        assert list(prefill + decode) == TEXTS[row][: len(prefill + decode)]
    assert all(case.prefills == tuple(each.prefills[0] for each in cases[:NUM_TEXTS]) for case in cases[NUM_TEXTS:])
    assert {case.padding for case in cases[NUM_TEXTS:]} == {"left", "right"}


def test_has_cases_for_gates_and_for_tokens(model: LayerwiseQuantizeForCausalLM, cases: list[Case], scope: str) -> None:
    expected = list(FORCED)
    if model.depth_routers:
        expected += ["all skipped", "every other one skipped"]
    if scope == "token":
        expected.append("tokens at different bits")
    assert [case.name for case in cases[NUM_TEXTS:]] == expected


def test_forces_what_it_says(model: LayerwiseQuantizeForCausalLM, cases: list[Case]) -> None:
    named = {case.name: bits_of(model, case) for case in cases[NUM_TEXTS:]}
    for bits in BITS:
        assert all(bool((of_layer == bits).all()) for of_layer in named[f"all at {bits} bits"])
    each = named["another one in each layer"]
    assert [of_layer.unique().tolist() for of_layer in each] == [[bits] for bits in BITS]
    if model.depth_routers:
        for layer, of_layer in enumerate(named["all skipped"]):
            assert bool((of_layer == 0).all()) is (layer in GATED)
        first, _, third = named["every other one skipped"]
        assert bool((first > 0).all()) and bool((third == 0).all())


def test_shows_every_branch_of_every_layer(model: LayerwiseQuantizeForCausalLM, cases: list[Case], scope: str) -> None:
    seen: list[set[object]] = [set() for _ in range(NUM_LAYERS)]
    for case in cases[NUM_TEXTS:]:
        for found, of_layer in zip(seen, bits_of(model, case), strict=True):
            different = of_layer.unique().tolist()
            if scope == "token":
                found.add("mixed" if len(different) > 1 else different[0])
            else:
                found |= set(different)
    for layer, found in enumerate(seen):
        expected = {*BITS, *([0] if layer in model.depth_routers else []), *(["mixed"] if scope == "token" else [])}
        assert found == expected


def test_is_json_of_finite_numbers(cases: list[Case]) -> None:
    stored = json.loads(json.dumps([asdict(case) for case in cases], allow_nan=False))
    assert [case["name"] for case in stored] == [case.name for case in cases]
    assert all(math.isfinite(value) for case in cases for row in case.precision_bias for value in row)


def test_leaves_the_model_as_it_was(model: LayerwiseQuantizeForCausalLM, cases: list[Case]) -> None:
    ids = torch.tensor([TEXTS[0]])
    before = model.infer_forward(ids)
    precision_cases(model, TEXTS, THRESHOLD)
    assert before.logits is not None
    torch.testing.assert_close(model.infer_forward(ids).logits, before.logits, rtol=0, atol=0)
    assert not any(router._forward_hooks for router in model.routers.values())


@pytest.mark.parametrize("depth", [None, DEPTH], ids=["without gates", "gates"])
def test_refuses_routers_that_tell_no_tokens_apart(quantized_folder: Path, depth: RouterConfig | None) -> None:
    """Those that nobody trained."""
    model = layerwise(quantized_folder, "token", depth)
    with pytest.raises(
        VerificationError, match=r"the router of layer 0 \(and of 2 more\) says the same of every token"
    ):
        precision_cases(model, TEXTS, THRESHOLD)
    let_routers_decide(model)
    nn.init.zeros_(model.routers[1].last.weight)
    ids = torch.tensor([TEXTS[0]])
    before = model.infer_forward(ids)
    with pytest.raises(VerificationError, match="the router of layer 1 says the same of every token"):
        precision_cases(model, TEXTS, THRESHOLD)
    torch.testing.assert_close(model.infer_forward(ids).logits, before.logits, rtol=0, atol=0)


def test_one_precision_differs_by_its_gates_alone(quantized_folder: Path) -> None:
    model = LayerwiseQuantizeForCausalLM.from_quantized(quantized_folder, [4], depth=DEPTH, router_scope="token")
    let_routers_decide(model)
    model.set_hard_threshold(THRESHOLD)
    case = precision_cases(model, TEXTS, THRESHOLD)[-1]
    assert case.name == "tokens at different bits"
    for layer, bits in enumerate(bits_of(model, case)):
        assert set(bits.tolist()) == ({0, 4} if layer in GATED else {4})
    gate_router = model.depth_routers[2]
    assert isinstance(gate_router, DepthRouter)
    nn.init.zeros_(gate_router.score.down.weight)
    with pytest.raises(VerificationError, match="the router of layer 2 says the same of every token"):
        precision_cases(model, TEXTS, THRESHOLD)


def test_one_precision_without_gates_needs_no_router(quantized_folder: Path) -> None:
    model = LayerwiseQuantizeForCausalLM.from_quantized(quantized_folder, [4], router_scope="token")
    assert "tokens at different bits" not in [case.name for case in precision_cases(model, TEXTS, THRESHOLD)]
