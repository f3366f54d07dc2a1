import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from modcompile.export.build_model import build_model
from modcompile.export.depth_subject import DepthSubject
from modcompile.export.session import MODEL_FILE
from modcompile.export.verification import Verification
from modcompile.export.verification_inputs import NUM_TEXTS, Case, verification_cases
from modcompile.export.verify_model import verify_model
from modcompile.modeling import RoutedForCausalLM
from tests.tiny_routed import ROUTED_LAYERS, tiny_routed

TEXTS = [[(row * 37 + index * 11) % 300 for index in range(100)] for row in range(8)]
NOT_EQUAL = r"logits differ by \S+, more than 0\.001 \(.+\)"


@pytest.fixture
def folder(onnx_folder: Path, tmp_path: Path) -> Path:
    """A copy of an export, to be tampered with."""
    return Path(shutil.copytree(onnx_folder, tmp_path / "onnx"))


@pytest.fixture
def model() -> RoutedForCausalLM:
    model = tiny_routed("straight_through")
    model.set_router_mode(0.5)
    return model


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    """Two rows alone, the batches with three rows of the eight, and one decode step: that saves time."""
    cases = verification_cases(tiny_routed("straight_through"), TEXTS, [0.5, 0.5])
    short = [replace(case, decodes=tuple(row[:1] for row in case.decodes)) for case in cases]
    batches = [replace(case, prefills=case.prefills[1:4], decodes=case.decodes[1:4]) for case in short[NUM_TEXTS:]]
    return [*short[3:5], *batches]


def tamper(folder: Path, change: Callable[[onnx.GraphProto], object]) -> None:
    proto = onnx.load(folder / MODEL_FILE, load_external_data=False)
    change(proto.graph)
    onnx.save(proto, folder / MODEL_FILE)


def conditional(graph: onnx.GraphProto, layer: int) -> onnx.NodeProto:
    (found,) = (node for node in graph.node if node.name == f"blocks.{layer}.if")
    return found


def assert_fails(result: Verification, *expected: str) -> None:
    assert not result.passed
    assert len(result.failures) == len(expected)
    for failure, pattern in zip(result.failures, expected, strict=True):
        assert re.fullmatch(pattern, failure)


def test_passes_what_was_exported(model: RoutedForCausalLM, folder: Path, cases: list[Case]) -> None:
    files = sorted(folder.iterdir())
    result = verify_model(DepthSubject(model), folder, cases)
    assert result.passed
    assert result.max_logit_difference == max(result.cases.values()) < 1e-4
    assert result.cases.keys() == {*(case.name for case in cases), "as shipped"}
    assert result.equal_routes == 1.0
    assert not result.never_seen
    assert sorted(folder.iterdir()) == files
    assert model.hard_thresholds == [0.5, 0.5]


@torch.no_grad()
def test_counts_what_it_compared(model: RoutedForCausalLM, folder: Path, cases: list[Case]) -> None:
    result = verify_model(DepthSubject(model), folder, cases)
    rows = [len(p) + len(d) for case in cases for p, d in zip(case.prefills, case.decodes, strict=True)]
    assert result.compared_tokens == sum(rows)
    assert result.compared_routes == sum(rows) * len(ROUTED_LAYERS)

    losses, executed, tokens = [], 0, 0
    for case in cases[:2]:
        ids = torch.tensor([case.prefills[0] + case.decodes[0]])
        output = model(ids)
        losses.append(torch.nn.functional.cross_entropy(output.logits[0, :-1], ids[0, 1:], reduction="none"))
        executed += sum(int(gate.sum()) for gate in output.gates or ())
        tokens += ids.numel()
    perplexity = float(torch.cat(losses).mean().exp())
    assert result.perplexity_torch == pytest.approx(perplexity, rel=1e-4)
    assert result.perplexity_onnx == pytest.approx(perplexity, rel=1e-4)
    assert result.active_ratio == executed / (2 * tokens)


@pytest.mark.parametrize("value", [1.0, np.nan])
@pytest.mark.parametrize("name", ["blocks.2.then_branch.block.mlp.down_proj.weight", "epilogue.model.lm_head.weight"])
def test_fails_where_a_weight_is_another(
    model: RoutedForCausalLM, folder: Path, cases: list[Case], name: str, value: float
) -> None:
    weight = ir.load(folder / MODEL_FILE).graph.initializers[name].const_value
    assert isinstance(weight, ir.ExternalTensor)
    with (folder / weight.location).open("r+b") as data:
        data.seek(weight.offset or 0)
        data.write(np.float32(value).tobytes())
    assert_fails(verify_model(DepthSubject(model), folder, cases), NOT_EQUAL)


@pytest.mark.parametrize("stored", [[0.5, 0.51], [0.0, 0.0]])
def test_fails_where_the_stored_thresholds_are_others(
    model: RoutedForCausalLM, folder: Path, cases: list[Case], stored: list[float]
) -> None:
    def change(graph: onnx.GraphProto) -> None:
        (threshold,) = (tensor for tensor in graph.initializer if tensor.name == "routing_threshold")
        threshold.CopyFrom(onnx.numpy_helper.from_array(np.array(stored, np.float32), "routing_threshold"))

    tamper(folder, change)
    expected = "routing_threshold does not hold what was asked for"
    assert_fails(verify_model(DepthSubject(model), folder, cases), expected)


def test_fails_where_thresholds_can_not_be_overridden(
    model: RoutedForCausalLM, folder: Path, cases: list[Case]
) -> None:
    tamper(folder, lambda graph: graph.input.pop())
    assert_fails(verify_model(DepthSubject(model), folder, cases), "2 thresholds for 0 gates; .*")


@pytest.mark.parametrize("layer", ROUTED_LAYERS)
def test_fails_where_branches_are_swapped(
    model: RoutedForCausalLM, folder: Path, cases: list[Case], layer: int
) -> None:
    def change(graph: onnx.GraphProto) -> None:
        first, second = conditional(graph, layer).attribute
        first.name, second.name = second.name, first.name

    tamper(folder, change)
    result = verify_model(DepthSubject(model), folder, cases)
    assert not result.passed
    assert re.fullmatch(NOT_EQUAL, result.failures[0])


@pytest.mark.parametrize("layer", ROUTED_LAYERS)
@pytest.mark.parametrize(("condition", "side"), [(True, "skipped"), (False, "executed")])
def test_fails_where_an_if_always_takes_one_side(
    model: RoutedForCausalLM, folder: Path, cases: list[Case], layer: int, condition: bool, side: str
) -> None:
    """Executing a layer that no token needs changes no output, so outputs alone would not tell."""

    def change(graph: onnx.GraphProto) -> None:
        graph.initializer.append(onnx.numpy_helper.from_array(np.array(condition), "constant"))
        conditional(graph, layer).input[0] = "constant"

    tamper(folder, change)
    result = verify_model(DepthSubject(model), folder, cases)
    assert not result.passed
    assert result.failures[-1] == f"the If of layer {layer} was never seen {side}"
    assert result.failures[-2].startswith("only ")


def test_fails_where_a_layer_has_no_if(model: RoutedForCausalLM, folder: Path, cases: list[Case]) -> None:
    tamper(folder, lambda graph: setattr(conditional(graph, 2), "name", "other"))
    assert_fails(verify_model(DepthSubject(model), folder, cases), "layer 2 has no If of its own")


def test_fails_where_the_artifact_tells_other_routes_than_it_takes(
    model: RoutedForCausalLM, folder: Path, cases: list[Case]
) -> None:
    def change(graph: onnx.GraphProto) -> None:
        first, second = (node for node in graph.node if node.output[0] in ("routing.0", "routing.2"))
        first.input[0], second.input[0] = second.input[0], first.input[0]

    tamper(folder, change)
    assert_fails(verify_model(DepthSubject(model), folder, cases), "only .* of the routes are equal, less than 99.9%")


@pytest.mark.parametrize(
    ("file", "keep", "expected"),
    [
        (MODEL_FILE, 1000, r"the ONNX checker refuses the model: .*"),
        (MODEL_FILE, 0, r"the ONNX checker refuses the model: .*"),
        (f"{MODEL_FILE}.data", 5000, r"ONNX Runtime can't load .*"),
        (f"{MODEL_FILE}.data", None, r"the ONNX checker refuses the model: .*"),
    ],
)
def test_fails_where_a_file_is_not_whole(
    model: RoutedForCausalLM, folder: Path, cases: list[Case], file: str, keep: int | None, expected: str
) -> None:
    if keep is None:
        (folder / file).unlink()
    else:
        (folder / file).write_bytes((folder / file).read_bytes()[:keep])
    assert_fails(verify_model(DepthSubject(model), folder, cases), expected)
    assert not (folder / ".routing.onnx").exists()


@pytest.fixture(scope="module")
def three_branches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export whose blocks have a branch without masks; not to be changed."""
    folder = tmp_path_factory.mktemp("three")
    model = tiny_routed("straight_through")
    model.set_router_mode(0.5)
    ir.save(build_model(model.hard_graph(), unmasked_branch=True), folder / MODEL_FILE)
    return folder


def test_passes_three_branches(model: RoutedForCausalLM, three_branches: Path, cases: list[Case]) -> None:
    subject = DepthSubject(model)
    result = verify_model(subject, three_branches, cases)
    assert result.passed
    assert subject.branches == dict.fromkeys(ROUTED_LAYERS, ("skipped", "executed", "executed without masks"))


@pytest.mark.parametrize("layer", ROUTED_LAYERS)
@pytest.mark.parametrize(("condition", "sides"), [(True, ["skipped", "executed"]), (False, ["executed without masks"])])
def test_fails_where_one_of_three_branches_is_never_taken(
    model: RoutedForCausalLM,
    three_branches: Path,
    tmp_path: Path,
    cases: list[Case],
    layer: int,
    condition: bool,
    sides: list[str],
) -> None:
    """Masks that let all through change no output, so outputs alone would not tell."""

    def change(graph: onnx.GraphProto) -> None:
        graph.initializer.append(onnx.numpy_helper.from_array(np.array(condition), "constant"))
        conditional(graph, layer).input[0] = "constant"

    folder = Path(shutil.copytree(three_branches, tmp_path / "onnx"))
    tamper(folder, change)
    result = verify_model(DepthSubject(model), folder, cases)
    assert result.never_seen == {layer: sides}
    assert result.failures[-1] == f"the If of layer {layer} was never seen {sides[-1]}"
    assert (len(result.failures) == 1) == (not condition)
