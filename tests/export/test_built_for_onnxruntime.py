"""What `build_model` makes with `max_positions`: in ONNX Runtime, against the lowered graph in PyTorch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common_passes
import onnxruntime as ort
import pytest
import torch
from torch import fx

from modcompile.export.build_model import build_model
from modcompile.export.decoder import Decoder
from modcompile.export.session import MODEL_FILE, RoutedSession
from modcompile.export.tell_routes import TellRoutes, has_unmasked_branch
from modcompile.passes.outlined_form import gated_layers
from tests.cached_steps import Step, at_tokens, run_steps, steps
from tests.export.onnx_text import operators
from tests.model_inputs import make_inputs
from tests.tiny_graphs import outlined_graph, shared_model
from tests.wide_models import (
    MAX_POSITIONS,
    NUM_LAYERS,
    WITH_POSITIONS,
    paddings,
    wide_lowered,
    wide_model,
)

CACHED = 2 * NUM_LAYERS


@dataclass(frozen=True)
class Built:
    """A lowered graph, and a session on what was built of it."""

    architecture: str
    gm: fx.GraphModule
    model: ir.Model
    session: RoutedSession

    def run(self, calls: Sequence[Step]) -> Iterator[list[torch.Tensor]]:
        """Logits, keys and values, and routing masks `[B, T, 1]` of each call, on a cache that grows."""
        cache = self.session.empty_cache(len(calls[0].input_ids))
        for call in calls:
            ids, mask, positions = (
                tensor.numpy() for tensor in (call.input_ids, call.attention_mask, call.position_ids)
            )
            logits, cache, told = self.session.run(ids, mask, positions, cache)
            masks = [told[name][..., None] for name in told if name.startswith("routing.")]
            arrays = [logits, *(value.numpy() for value in cache), *masks]
            yield [torch.from_numpy(array.copy()) for array in arrays]


def built_of(architecture: str, gm: fx.GraphModule, folder: Path, *, unmasked_branch: bool) -> Built:
    model = build_model(gm, emit_routing=True, max_positions=MAX_POSITIONS, unmasked_branch=unmasked_branch)
    ir.save(model, folder / MODEL_FILE)
    return Built(architecture, gm, model, RoutedSession(folder / MODEL_FILE, providers=["CPUExecutionProvider"]))


_CASES = [
    ("llama", 1, False),
    ("llama", 2, False),
    ("gpt2", 2, False),
    ("gemma3", 1, False),
    ("llama", 2, True),
    ("gpt2", 1, True),
]
"""Architecture, gates per decision, and whether blocks have a branch without masks."""


@pytest.fixture(scope="module", params=_CASES, ids=str)
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Built:
    architecture, gates_per_decision, unmasked_branch = request.param
    gates = (range(2), range(2, 3)) if architecture == "gpt2" else (range(1), range(1, 2), range(2, 3))
    gm = wide_lowered(architecture, gates, gates_per_decision=gates_per_decision)
    return built_of(architecture, gm, tmp_path_factory.mktemp(architecture), unmasked_branch=unmasked_branch)


@pytest.mark.parametrize("threshold", [0.0, 0.5, 2.0])
def test_computes_what_pytorch_computes(built: Built, threshold: float) -> None:
    built.gm.get_buffer("routing_threshold").fill_(threshold)
    built.session.thresholds = threshold
    model, seen = wide_model(built.architecture), set()
    for padding in paddings(built.architecture, "none", "left", "right"):
        run = steps(model, padding)
        for call, actual, expected in zip(run, built.run(run), run_steps(built.gm, model, run), strict=True):
            (logits, *masks), (wanted, *wanted_masks) = (at_tokens(each, call, CACHED) for each in (actual, expected))
            torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-4)
            torch.testing.assert_close(masks, wanted_masks, rtol=0, atol=0)
            if padding == "none":
                torch.testing.assert_close(actual[1 : 1 + CACHED], list(expected[1 : 1 + CACHED]), rtol=0, atol=1e-4)
            seen |= {bool(value) for mask in masks for value in mask.flatten()}
    assert seen == ({True, False} if threshold == 0.5 else {threshold == 0.0})


def test_takes_several_tokens_of_one_row_after_others(built: Built) -> None:
    built.gm.get_buffer("routing_threshold").fill_(0.5)
    built.session.thresholds = 0.5
    model = wide_model(built.architecture)
    run = steps(model, "none", batch=1, lengths=(3, 4, 1))
    for call, *outputs in zip(run, built.run(run), run_steps(built.gm, model, run), strict=True):
        torch.testing.assert_close(*(at_tokens(each, call, CACHED) for each in outputs), rtol=0, atol=1e-4)


@pytest.mark.parametrize("capacity", [1, 20])
def test_decodes_in_place_what_a_growing_cache_decodes(built: Built, capacity: int) -> None:
    """Layers are skipped on the way, and a capacity of one token doubles on the way."""
    built.session.thresholds = 0.5
    assert built.session.model.in_place
    model = wide_model(built.architecture)
    for padding in paddings(built.architecture, "left", "right"):
        run = steps(model, padding, lengths=(5, *[1] * 6))
        decoder, skipped = Decoder(built.session, 3, capacity), 0
        for call, expected in zip(run, built.run(run), strict=True):
            logits, told = decoder.step(call.input_ids.numpy(), call.is_token.long().numpy(), logits_to_keep=5)
            actual = [torch.from_numpy(array) for array in (logits, *told.values())]
            wanted = [expected[0], *(mask.squeeze(-1) for mask in expected[1 + CACHED :])]
            for mine, theirs in zip(actual, wanted, strict=True):
                torch.testing.assert_close(mine[call.is_token], theirs[call.is_token], rtol=0, atol=1e-5)
            skipped += sum(not mask.any() for mask in told.values())
        assert decoder.length == 11
    assert skipped


def test_tells_what_its_cache_allows_and_how_it_is_fed(built: Built) -> None:
    assert dict(built.model.metadata_props) == {"modcompile.cache": "in_place"}
    names = [value.name for value in built.session.model.session.get_inputs()]
    pasts = [f"past_key_values.{layer}.{part}" for layer in range(NUM_LAYERS) for part in ("key", "value")]
    positions = ["position_ids"] if built.architecture in WITH_POSITIONS else []
    assert names == ["input_ids", "attention_mask", *positions, *pasts]
    optional = {value.name: value.shape for value in built.session.model.session.get_overridable_initializers()}
    gates = len(built.gm.get_buffer("routing_threshold"))
    assert optional == {"routing_threshold": [gates], "logits_to_keep": [1]}
    onnx.checker.check_model(ir.to_proto(built.model), full_check=True)
    assert built.model.opset_imports == {"": 23, "com.microsoft": 1}


def test_every_branch_appends_by_one_operator(built: Built) -> None:
    found = operators(built.model.graph)
    unmasked_branch = any(has_unmasked_branch(built.model, layers) for layers in gated_layers(built.gm))
    assert found.count("If") == len(built.gm.get_buffer("routing_threshold")) * (1 + unmasked_branch)
    assert found.count("GroupQueryAttention") == NUM_LAYERS * (2 + unmasked_branch)
    assert not {"Attention", "RotaryEmbedding", "Cos", "Sin"} & set(found)


@pytest.mark.parametrize("count", [1, 3, 100])
def test_returns_so_many_logits(built: Built, count: int) -> None:
    inputs = make_inputs(wide_model(built.architecture), 2, 5, 0)
    feeds = {"input_ids": inputs.input_ids, "attention_mask": inputs.attention_mask}
    if built.architecture in WITH_POSITIONS:
        feeds["position_ids"] = inputs.position_ids
    pasts = dict(zip(built.session.model.pasts, inputs.flat[3:], strict=True))
    arrays = {name: tensor.numpy() for name, tensor in (feeds | pasts).items()}
    session = built.session.model.session
    (logits,) = session.run(["logits"], arrays)
    (kept,) = session.run(["logits"], arrays | {"logits_to_keep": np.array([count])})
    assert logits.shape[1] == 5
    np.testing.assert_allclose(kept, logits[:, -count:], rtol=0, atol=1e-5)


def test_routes_are_told_in_the_order_in_which_tokens_came(built: Built, tmp_path: Path) -> None:
    """By an artifact without --emit_routing, too, from inside the branches that ran."""
    silent = ir.from_proto(ir.to_proto(built.model))
    silent.graph.outputs[:] = [value for value in silent.graph.outputs if not str(value.name).startswith("routing.")]
    common_passes.RemoveUnusedNodesPass()(silent)
    TellRoutes(gated_layers(built.gm))(silent)
    ir.save(silent, tmp_path / MODEL_FILE)
    session = RoutedSession(tmp_path / MODEL_FILE, thresholds=0.5, providers=["CPUExecutionProvider"])
    built.session.thresholds = 0.5
    padding = paddings(built.architecture, "left")[0]
    run = steps(wide_model(built.architecture), padding)
    telling = Built(built.architecture, built.gm, silent, session)
    told = set()
    for call, actual, expected in zip(run, telling.run(run), built.run(run), strict=True):
        for mask, wanted in zip(actual[1 + CACHED :], expected[1 + CACHED :], strict=True):
            assert torch.equal(mask[call.is_token], wanted[call.is_token])
            told |= set(mask[call.is_token].flatten().tolist())
    assert told == {True, False}


def test_what_cannot_be_fused_says_so_and_runs_all_the_same() -> None:
    gm = outlined_graph("llama")
    model = build_model(gm, max_positions=MAX_POSITIONS)
    reason = "attention: heads of 8 features, where the operator takes multiples of 16"
    assert dict(model.metadata_props) == {"modcompile.unfused": reason}
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    inputs = make_inputs(shared_model("llama"), 3, 5, 4, "left")
    names = [value.name for value in session.get_inputs()]
    feeds = {name: tensor.numpy() for name, tensor in zip(names, inputs.flat, strict=True)}
    logits = torch.from_numpy(session.run(["logits"], feeds)[0])
    with torch.no_grad():
        expected = gm(*inputs.flat)[0]
    torch.testing.assert_close(logits[inputs.is_token], expected[inputs.is_token], rtol=0, atol=1e-5)
