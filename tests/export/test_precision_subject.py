"""What is exported of models that choose precisions is verified, and what was tampered with is found out."""

import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from transformers import DynamicCache

from modcompile.config import RouterConfig, SkipAdapterKind
from modcompile.export import verification
from modcompile.export.build_model import build_model
from modcompile.export.export_config import ExportConfig
from modcompile.export.exportable import load_exportable
from modcompile.export.overrides import BIAS_INPUT
from modcompile.export.precision_cases import precision_cases
from modcompile.export.precision_subject import PrecisionSubject
from modcompile.export.session import MODEL_FILE
from modcompile.export.shipped_perplexity import ShippedPerplexity
from modcompile.export.verification import Verification
from modcompile.export.verification_inputs import NUM_TEXTS, Case
from modcompile.export.verify_model import verify_model
from modcompile.graph_inputs import graph_inputs
from modcompile.layerwise import LayerwiseQuantizeForCausalLM
from tests.tiny_quantized import BITS, NUM_LAYERS, let_routers_decide

TEXTS = [[(row * 37 + index * 11) % 300 for index in range(100)] for row in range(NUM_TEXTS)]
ROWS = TEXTS[:2]
THRESHOLD = 0.5
NOT_EQUAL = r"logits differ by \S+, more than 0\.001 \(.+\)"
ROUTES = r"only \S+% of the routes are equal, less than 99\.9%"
PERPLEXITY = r"the perplexity differs by \S+%, more than [0-3]\.\d% \(own decisions, row by row\)"
FORCED = r"the perplexity differs by \S+%, more than 5\.0% \(.+\)"
KINDS: dict[str, tuple[str, SkipAdapterKind | None, list[int]]] = {
    "one precision": ("sequence", None, [4]),
    "two precisions": ("sequence", None, [4, 16]),
    "one precision and gates": ("sequence", "none", [4]),
    "two precisions, gates and adapters": ("sequence", "low_rank", [4, 16]),
    "tokens and gates": ("token", "none", [4, 16]),
    "tokens, gates and adapters": ("token", "low_rank", [4, 16]),
    "one precision, tokens and gates": ("token", "scale", [4]),
}
"""Who decides, what skips a gated block goes through (None: no gates), and the precisions."""


@dataclass(frozen=True)
class Exported:
    """A model, what was exported of it, and what that is tried on."""

    model: LayerwiseQuantizeForCausalLM
    folder: Path
    cases: list[Case]

    def verify(self, cases: Sequence[Case] | None = None) -> Verification:
        """On two rows of 100 tokens, as shipped."""
        shipped = ShippedPerplexity(ROWS, self.model.rounded_graph)
        return verify_model(PrecisionSubject(self.model, shipped, THRESHOLD), self.folder, cases or self.cases)


def shortened(model: LayerwiseQuantizeForCausalLM) -> list[Case]:
    """Two rows alone, the batches with three rows of the eight, and one decode step: that saves time."""
    cases = precision_cases(model, TEXTS, THRESHOLD)
    short = [replace(case, decodes=tuple(row[:1] for row in case.decodes)) for case in cases]
    batches = [replace(case, prefills=case.prefills[1:4], decodes=case.decodes[1:4]) for case in short[NUM_TEXTS:]]
    return [*short[3:5], *batches]


@pytest.fixture(scope="module", params=KINDS)
def built(request: pytest.FixtureRequest, quantized_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    scope, skip, precisions = KINDS[request.param]
    gates = RouterConfig(router_hidden_size=8, lock_last_layers=1, adapter_rank=4)
    depth = None if skip is None else replace(gates, skip_adapter=skip)
    model = LayerwiseQuantizeForCausalLM.from_quantized(quantized_folder, precisions, depth=depth, router_scope=scope)
    let_routers_decide(model)
    folder = tmp_path_factory.mktemp("built")
    onnx_model = build_model(model.export_graph(), emit_routing=scope == "token")
    ir.save(onnx_model, folder / MODEL_FILE, external_data=f"{MODEL_FILE}.data")
    return Exported(model, folder, shortened(model))


@pytest.fixture(scope="module")
def three(precision_onnx_folder: Path) -> Exported:
    model = LayerwiseQuantizeForCausalLM.from_quantized(precision_onnx_folder.parent)
    return Exported(model, precision_onnx_folder, shortened(model))


def copied(exported: Exported, tmp_path: Path) -> Exported:
    return replace(exported, folder=Path(shutil.copytree(exported.folder, tmp_path / "copy")))


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_passes_blocks_of_precisions_between_ends_of_rounded_weights(
    precision_onnx_folder: Path, tmp_path: Path, weights: Any
) -> None:
    """Rounded are the embedding and the head alone, whose inputs are rounded in PyTorch, too."""
    source = precision_onnx_folder.parent
    loaded = load_exportable(source, ExportConfig(weights=weights), lambda _: TEXTS)
    onnx_model = build_model(loaded.graph())
    ir.save(onnx_model, tmp_path / MODEL_FILE, external_data=f"{MODEL_FILE}.data")
    original = LayerwiseQuantizeForCausalLM.from_quantized(source)
    assert loaded.proof is not None
    result = verify_model(loaded.proof.subject, tmp_path, shortened(original))
    assert result.failures == []
    assert result.max_logit_difference < 1e-4
    losses = [
        torch.nn.functional.cross_entropy(original(torch.tensor([row])).logits[0, :-1], torch.tensor(row[1:]))
        for row in TEXTS
    ]
    assert result.perplexity_unrounded == pytest.approx(float(torch.stack(losses).mean().exp()), rel=1e-5)
    ends = {name for name in onnx_model.graph.initializers if "packed" in name and not name.startswith("blocks.")}
    assert ends == {"prologue.model.model.embed_tokens.weight_packed", "epilogue.model.lm_head.weight_packed"}
    blocks = [node for node in onnx_model.graph.all_nodes() if node.op_type == "MatMulNBits"][:-1]
    before = build_model(original.export_graph())
    assert len(blocks) == sum(node.op_type == "MatMulNBits" for node in before.graph.all_nodes())


@pytest.fixture
def copy(three: Exported, tmp_path: Path) -> Exported:
    """Of three precisions, to be tampered with."""
    return copied(three, tmp_path)


def tamper(folder: Path, change: Callable[[onnx.GraphProto], object]) -> None:
    proto = onnx.load(folder / MODEL_FILE, load_external_data=False)
    change(proto.graph)
    onnx.save(proto, folder / MODEL_FILE)


def conditional(graph: onnx.GraphProto, name: str) -> onnx.NodeProto:
    (found,) = (node for node in graph.node if node.name == name)
    return found


def always(condition: bool, name: str) -> Callable[[onnx.GraphProto], None]:
    """Have an If go one way whatever was decided."""

    def change(graph: onnx.GraphProto) -> None:
        graph.initializer.append(onnx.numpy_helper.from_array(np.array(condition), "constant"))
        conditional(graph, name).input[0] = "constant"

    return change


def assert_fails(result: Verification, *expected: str) -> None:
    """All are told; what is wrong may, or may not, take the perplexity out of its bounds as well."""
    assert not result.passed
    told = [[failure for failure in result.failures if re.fullmatch(pattern, failure)] for pattern in expected]
    assert all(told), result.failures
    others = set(result.failures).difference(*told)
    assert all(failure.startswith("the perplexity differs by ") for failure in others), others


def bits_alone(model: LayerwiseQuantizeForCausalLM, case: Case) -> torch.Tensor:
    """What the tokens of a single row get in PyTorch, each layer by itself: `[L, T]`."""
    found, cache = [], DynamicCache()
    for ids in (case.prefills[0], *((token,) for token in case.decodes[0])):
        output = model.infer_forward(torch.tensor([ids]), past_key_values=cache)
        assert output.num_bits is not None and isinstance(output.past_key_values, DynamicCache)
        found.append(torch.cat(output.num_bits))
        cache = output.past_key_values
    return torch.cat(found, 1)


def assert_passes(exported: Exported) -> None:
    files = sorted(exported.folder.iterdir())
    result = exported.verify()
    assert result.failures == []
    assert result.never_seen == {}
    assert result.max_logit_difference == max(result.cases.values()) < 1e-4
    assert result.cases.keys() == {case.name for case in exported.cases}
    assert result.equal_routes == 1.0
    assert np.isnan(result.active_ratio)
    assert sorted(exported.folder.iterdir()) == files
    rounded = result.perplexity_rounded
    assert rounded["onnx"] == pytest.approx(rounded["torch"], rel=verification.MAX_PERPLEXITY_CHANGE)
    # What was counted, by PyTorch alone, deciding for itself again.
    own = torch.cat([bits_alone(exported.model, case) for case in exported.cases[:2]], 1)
    assert result.average_bits == pytest.approx(float(own.double().mean()))


def test_passes_what_was_exported(built: Exported) -> None:
    assert_passes(built)


def test_passes_three_precisions(three: Exported) -> None:
    assert_passes(three)


def test_no_quantized_weight_lies_more_than_an_if_above_its_use(built: Exported) -> None:
    graph = ir.load(built.folder / MODEL_FILE).graph
    inside = [
        node
        for conditional in graph
        for attribute in conditional.attributes.values()
        if attribute.type == ir.AttributeType.GRAPH
        for node in attribute.as_graph()
    ]
    products = [node for node in (*graph, *inside) if node.op_type == "MatMulNBits"]
    assert products
    assert len(products) == sum(node.op_type == "MatMulNBits" for node in graph.all_nodes())
    for node in products:
        _, *weights = node.inputs
        assert all(value is None or value.name in graph.initializers for value in weights)


@pytest.mark.parametrize("built", ["one precision and gates", "tokens and gates"], indirect=True)
def test_fails_where_the_stored_thresholds_are_others(built: Exported, tmp_path: Path) -> None:
    other = copied(built, tmp_path)
    replace_initializer(other.folder, "routing_threshold", np.array([0.5, 0.51], np.float32))
    assert_fails(other.verify(), "routing_threshold does not hold what was asked for")


@pytest.mark.parametrize("built", ["one precision and gates"], indirect=True)
@pytest.mark.parametrize(("condition", "missing"), [(True, "at 4 bits"), (False, "skipped")])
def test_fails_where_an_if_always_takes_one_side(
    built: Exported, tmp_path: Path, condition: bool, missing: str
) -> None:
    """Executing a layer that no token needs changes no output, so outputs alone would not tell."""
    other = copied(built, tmp_path)
    tamper(other.folder, always(condition, "blocks.1.if"))
    # What one block does to own decisions is within chance on so few tokens.
    lines = [ROUTES, *([FORCED] if condition else []), f"the If of layer 1 was never seen {missing}"]
    assert_fails(other.verify(), *lines)


@pytest.mark.parametrize("built", ["one precision and gates"], indirect=True)
def test_fails_where_the_branches_of_an_if_are_swapped(built: Exported, tmp_path: Path) -> None:
    other = copied(built, tmp_path)

    def change(graph: onnx.GraphProto) -> None:
        first, second = conditional(graph, "blocks.0.if").attribute
        first.name, second.name = second.name, first.name

    tamper(other.folder, change)
    assert_fails(other.verify(), NOT_EQUAL, ROUTES, PERPLEXITY, FORCED)


def replace_initializer(folder: Path, name: str, value: np.ndarray) -> None:
    def change(graph: onnx.GraphProto) -> None:
        (found,) = (tensor for tensor in graph.initializer if tensor.name == name)
        found.CopyFrom(onnx.numpy_helper.from_array(value, name))

    tamper(folder, change)


def overwrite(folder: Path, name: str, change: Callable[[bytes], bytes]) -> None:
    """The first four bytes of an initializer outside of the model."""
    stored = ir.load(folder / MODEL_FILE).graph.initializers[name].const_value
    assert isinstance(stored, ir.ExternalTensor)
    with (folder / stored.location).open("r+b") as data:
        data.seek(stored.offset or 0)
        before = data.read(4)
        data.seek(stored.offset or 0)
        data.write(change(before))


def test_fails_where_a_code_is_flipped(copy: Exported) -> None:
    name = "blocks.1.branch_0.mlp.down_proj.weight_part_2_packed"
    stored = ir.load(copy.folder / MODEL_FILE).graph.initializers[name].const_value
    assert stored is not None
    codes = stored.numpy().copy()
    codes.flat[0] ^= 0xFF
    replace_initializer(copy.folder, name, codes)
    assert_fails(copy.verify(), NOT_EQUAL)


def test_fails_where_the_perplexity_is_infinite(copy: Exported) -> None:
    overwrite(copy.folder, "epilogue.model.lm_head.weight", lambda _: np.float32(1e9).tobytes())
    result = copy.verify()
    infinite = [
        re.escape(f"the perplexity differs by inf%, more than {bound} (") + r".+\)" for bound in ("0.5%", *["5.0%"] * 4)
    ]
    assert_fails(result, NOT_EQUAL, *infinite)
    assert result.perplexity_onnx == result.perplexity_rounded["onnx"] == np.inf


@pytest.mark.parametrize("scale", [1.0, np.nan, 1e30])
def test_fails_where_a_scale_is_another(copy: Exported, scale: float) -> None:
    name = "blocks.1.branch_0.mlp.down_proj.weight_part_2_scales"
    stored = ir.load(copy.folder / MODEL_FILE).graph.initializers[name].const_value
    assert stored is not None
    scales = stored.numpy().copy()
    scales[0, 0] = scale
    replace_initializer(copy.folder, name, scales)
    result = copy.verify()
    assert re.fullmatch(NOT_EQUAL, result.failures[0])
    assert any(re.fullmatch(PERPLEXITY, failure) for failure in result.failures)


@pytest.mark.parametrize("bias", [1e-3, np.inf])
def test_fails_where_the_stored_bias_is_another(copy: Exported, bias: float) -> None:
    stored = np.zeros((NUM_LAYERS, len(BITS)), np.float32)
    stored[1, 2] = bias
    replace_initializer(copy.folder, "precision_bias", stored)
    assert_fails(copy.verify(), "precision_bias does not hold what was asked for")


@pytest.mark.parametrize("index", [1, 2])
def test_fails_where_what_is_taken_and_kept_is_swapped(copy: Exported, index: int) -> None:
    def change(graph: onnx.GraphProto) -> None:
        first, second = conditional(graph, f"blocks.1.if_{index}").attribute
        first.name, second.name = second.name, first.name

    tamper(copy.folder, change)
    result = copy.verify()
    assert not result.passed
    assert re.fullmatch(rf"{NOT_EQUAL}|ONNX Runtime can't run .*", result.failures[0])


def test_fails_where_a_branch_runs_that_nobody_asked_for(copy: Exported) -> None:
    tamper(copy.folder, always(True, "blocks.1.if_2"))
    missing = [f"the If of layer 1 was never seen at {bits} bits" for bits in BITS[:2]]
    assert_fails(copy.verify(), ROUTES, PERPLEXITY, *missing)


def test_fails_where_no_branch_runs(copy: Exported) -> None:
    tamper(copy.folder, always(False, "blocks.1.if"))
    result = copy.verify()
    assert not result.passed
    assert re.match(r"ONNX Runtime can't run .*\.onnx: ", result.failures[0])
    assert "\n" not in result.failures[0]


def test_fails_where_a_layer_has_too_few_ifs(copy: Exported) -> None:
    tamper(copy.folder, lambda graph: setattr(conditional(graph, "blocks.2.if_1"), "name", "other"))
    assert_fails(copy.verify(), "layer 2 has not the 3 If nodes of its 3 branches")


def test_fails_where_the_bias_can_not_be_overridden(copy: Exported) -> None:
    def fix_bias(graph: onnx.GraphProto) -> None:
        (bias,) = (value for value in graph.input if value.name == BIAS_INPUT)
        graph.input.remove(bias)

    tamper(copy.folder, fix_bias)
    assert_fails(copy.verify(), "a precision bias for an artifact that does not choose precisions; leave it out")


def test_fails_where_a_branch_was_never_seen(three: Exported) -> None:
    cases = [case for case in three.cases if case.name in ("own decisions, row by row", "all at 2 bits")]
    seen = [{BITS[0]} for _ in range(NUM_LAYERS)]
    for case in cases[:2]:
        for found, of_layer in zip(seen, bits_alone(three.model, case), strict=True):
            found |= set(of_layer.tolist())
    missing = {layer: [f"at {bits} bits" for bits in BITS if bits not in found] for layer, found in enumerate(seen)}
    result = three.verify(cases)
    assert result.never_seen == {layer: names for layer, names in missing.items() if names} != {}
    named = {name: layer for layer, names in reversed(missing.items()) for name in names}
    assert sorted(result.failures) == sorted(
        f"the If of layer {layer} was never seen {name}" for name, layer in named.items()
    )


def test_fails_where_the_perplexity_as_shipped_differs(three: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is measured on the artifact as it is, and in PyTorch with activations rounded alike."""
    monkeypatch.setattr(verification, "MAX_PERPLEXITY_CHANGE", -1.0)
    result = three.verify()
    assert_fails(result, r"the perplexity differs by \d\.\d\d%, more than -100\.0% \(own decisions, row by row\)")
    session = ort.InferenceSession(str(three.folder / MODEL_FILE), providers=["CPUExecutionProvider"])
    losses: dict[str, list[float]] = {"onnx": [], "torch": [], "float": []}
    for row in ROWS:
        ids = np.array([row])
        empty = np.zeros((1, 2, 0, 8), np.float32)
        feeds: dict[str, np.ndarray] = {
            value.name: empty for value in session.get_inputs() if value.name.startswith("past_key_values.")
        }
        feeds |= {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(len(row))[None]}
        logits = {"onnx": torch.from_numpy(session.run(["logits"], feeds)[0])}
        logits["float"] = three.model(torch.from_numpy(ids)).logits
        rounded = three.model.rounded_graph()
        logits["torch"] = rounded(*graph_inputs(rounded, torch.from_numpy(ids)))[0]
        for runtime, of_row in logits.items():
            losses[runtime].append(float(torch.nn.functional.cross_entropy(of_row[0, :-1], torch.tensor(row[1:]))))
    expected = {runtime: float(np.exp(np.mean(of_rows))) for runtime, of_rows in losses.items()}
    assert result.perplexity_rounded["onnx"] == pytest.approx(expected["onnx"], rel=1e-5)
    assert result.perplexity_rounded["torch"] == pytest.approx(expected["torch"], rel=1e-5)
    assert expected["float"] != pytest.approx(expected["torch"], rel=1e-5)


def test_measures_the_artifact_as_shipped_with_every_decision_forced(
    three: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verification, "MAX_FORCED_CHANGE", -1.0)
    result = three.verify()
    names = [f"all at {bits} bits" for bits in BITS] + ["another one in each layer"]
    assert list(result.perplexities_forced) == names
    assert [failure.partition("(")[2] for failure in result.failures] == [f"{name})" for name in names]
    session = ort.InferenceSession(str(three.folder / MODEL_FILE), providers=["CPUExecutionProvider"])
    forced = {case.name: case for case in three.cases}
    for name in names:
        losses = []
        for row in ROWS:
            ids = np.array([row])
            feeds: dict[str, np.ndarray] = {
                value.name: np.zeros((1, 2, 0, 8), np.float32)
                for value in session.get_inputs()
                if value.name.startswith("past_key_values.")
            }
            feeds |= {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(len(row))[None]}
            feeds["precision_bias"] = np.array(forced[name].precision_bias, np.float32)
            logits = torch.from_numpy(session.run(["logits"], feeds)[0])
            losses.append(float(torch.nn.functional.cross_entropy(logits[0, :-1], torch.tensor(row[1:]))))
        found = result.perplexities_forced[name]
        assert found["onnx"] == pytest.approx(float(np.exp(np.mean(losses))), rel=1e-5)
        assert found["torch"] == pytest.approx(found["onnx"], rel=0.05)
