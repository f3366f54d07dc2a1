import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from modcompile.artifacts import read_report, update_report, write_routed_folder
from modcompile.config import RouterConfig
from modcompile.errors import ArtifactError, DataError, OutputError, UnsupportedModelError, VerificationError
from modcompile.export import verification, verification_inputs
from modcompile.export.export_config import ExportConfig
from modcompile.export.export_folder import ExportResult, export_folder, is_onnx_folder
from modcompile.export.generation import generate
from modcompile.export.session import MODEL_FILE, RoutedSession
from modcompile.export.tell_routes import has_unmasked_branch
from modcompile.routed_graph import build_routed
from tests.export.prebuilt import use_prebuilt
from tests.tiny_any_precision import tiny_any_precision, write_any_precision
from tests.tiny_routed import GATED_LAYERS, tiny_adapted, tiny_base, tiny_decided_at_once, tiny_grouped, tiny_routed
from tests.wide_models import wide_model

TOKENIZER = {"tokenizer.json", "tokenizer_config.json"}
CONFIGS = {"config.json", "generation_config.json", "genai_config.json"}
FILES = {*CONFIGS, MODEL_FILE, f"{MODEL_FILE}.data", "verification.json", *TOKENIZER}
ROOT = Path(__file__).parents[2]
TOKENS = 7 * (1 + 2 + 5 + 9 + 16 + 27 + 41 + 64 + 8 * 16)
"""Eight texts, once alone and in six batches: their prefills, and 16 steps each."""


@pytest.fixture(scope="module")
def exported(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> ExportResult:
    """An export of an untrained model, whose gates are all equal, from beginning to end."""
    folder = tmp_path_factory.mktemp("untrained") / "routed"
    write_routed_folder(build_routed(tiny_base(), RouterConfig(router_hidden_size=8)), tokenizer, folder)
    return export_folder(folder, folder / "onnx", ExportConfig(hard_threshold=0.4))


@pytest.fixture
def folder(routed_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(routed_folder, tmp_path / "routed"))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def stored(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "verification.json").read_text(encoding="utf-8")))


def test_writes_the_model_its_tokenizer_and_what_was_proved(exported: ExportResult) -> None:
    assert names(exported.output) == FILES
    assert is_onnx_folder(exported.output)
    told = stored(exported.output)
    assert told.pop("average_bits") is None  # NaN is no JSON
    expected = json.loads(json.dumps(exported.verification.as_json()))
    assert told == {key: value for key, value in expected.items() if key != "average_bits"}
    assert AutoConfig.from_pretrained(exported.output).model_type == "llama"
    assert AutoTokenizer.from_pretrained(exported.output)("hello").input_ids
    assert not [name for name in names(exported.output.parent) if name.startswith(".")]


def test_proves_every_if_of_an_untrained_model_from_both_sides(exported: ExportResult) -> None:
    proved = exported.verification
    assert proved.passed
    assert proved.max_logit_difference < 1e-4
    assert proved.equal_routes == proved.active_ratio == 1.0
    assert not proved.never_seen
    assert proved.compared_tokens == TOKENS
    assert proved.perplexity_onnx == pytest.approx(proved.perplexity_torch, rel=1e-4)


def test_holds_the_thresholds_asked_for_and_tells_no_routes(exported: ExportResult) -> None:
    graph = onnx.load(exported.output / MODEL_FILE, load_external_data=False).graph
    (threshold,) = (tensor for tensor in graph.initializer if tensor.name == "routing_threshold")
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(threshold), np.full(3, 0.4, np.float32))
    presents = [f"present.{layer}.{part}" for layer in range(3) for part in ("key", "value")]
    assert [value.name for value in graph.output] == ["logits", *presents]


def test_reports_to_the_routed_folder(exported: ExportResult) -> None:
    report = read_report(exported.output.parent)["export"]
    assert report["output"] == str(exported.output)
    assert (report["weights"], report["group_size"]) == ("fp32", None)
    assert report["passed"] is True
    assert list(report["seconds"]) == ["loading and tracing", "lowering to ONNX", "writing the ONNX model", "verifying"]


def test_sums_up_in_three_lines(exported: ExportResult) -> None:
    first, second, third = exported.summary().splitlines()
    assert first.startswith(f"wrote {exported.output} (loading and tracing ")
    assert second.startswith(f"verified on {TOKENS:,} tokens: logits differ by at most ")
    assert second.endswith(f", 100.00% of {3 * TOKENS:,} routes are equal, every branch of every If was seen")
    assert third.endswith("active ratio 1.000")


@pytest.fixture(scope="module")
def grouped(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> ExportResult:
    """An export with --emit_routing of a model whose layers 0 and 1 share a gate."""
    folder = tmp_path_factory.mktemp("grouped") / "routed"
    write_routed_folder(tiny_grouped("straight_through"), tokenizer, folder)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(verification_inputs, "NUM_DECODE_STEPS", 2)  # that saves time
        return export_folder(folder, folder / "onnx", ExportConfig(emit_routing=True))


@pytest.mark.parametrize("emit_routing", [False, True])
def test_folds_gates_that_never_skip_into_a_dense_model(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, emit_routing: bool
) -> None:
    monkeypatch.setattr(verification_inputs, "NUM_DECODE_STEPS", 1)
    folder = tmp_path / "routed"
    write_routed_folder(build_routed(tiny_base(), RouterConfig(router_hidden_size=8)), tokenizer, folder)
    update_report(folder, "training", {})  # Without it they would be known not to be trained.
    result = export_folder(folder, folder / "onnx", ExportConfig(emit_routing=emit_routing))
    assert result.summary().splitlines()[1] == "0 of 3 gates kept, 3 always open, 0 never: the artifact is dense"
    assert result.verification.passed
    assert result.verification.active_ratio == 1.0
    graph = onnx.load(result.output / MODEL_FILE, load_external_data=False).graph
    assert not [node for node in graph.node if node.op_type == "If"]
    assert read_report(folder)["export"]["folding"]["always_active"] == ["0", "1", "2"]
    assert names(result.output) == FILES


@pytest.mark.parametrize(
    ("config", "branches"),
    [
        (ExportConfig(weights="int4", group_size=16), 3),
        (ExportConfig(weights="int4", group_size=16, unmasked_branch="never"), 2),
        (ExportConfig(unmasked_branch="always"), 3),
        (ExportConfig(), 2),
        (ExportConfig(weights="int8", target="onnx"), 2),
    ],
    ids=["int4", "int4, never", "fp32, always", "fp32", "int8, onnx"],
)
def test_adapters_of_integer_models_get_a_branch_without_them(
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    config: ExportConfig,
    branches: int,
) -> None:
    monkeypatch.setattr(verification_inputs, "NUM_DECODE_STEPS", 1)
    folder = tmp_path / "routed"
    write_routed_folder(tiny_adapted("straight_through"), tokenizer, folder)
    result = export_folder(folder, folder / "onnx", config)
    assert result.verification.passed
    model = ir.load(result.output / MODEL_FILE)
    assert {has_unmasked_branch(model, layers) for layers in GATED_LAYERS} == {branches == 3}


def test_folds_what_is_asked_for_and_counts_it(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification_inputs, "NUM_DECODE_STEPS", 1)
    config = ExportConfig(emit_routing=True, always_skipped="0")
    result = export_folder(folder, tmp_path / "onnx", config)
    assert result.verification.passed
    assert result.verification.compared_routes == result.verification.compared_tokens
    model = tiny_routed("straight_through")
    session = RoutedSession(result.output / MODEL_FILE, providers=["CPUExecutionProvider"])
    assert session.num_thresholds == 1
    assert session.gated_layers == (range(2, 3),)
    prompt = torch.tensor([[5, 6, 7, 200, 3, 41, 17]])
    options = GenerationConfig(max_new_tokens=12, do_sample=False, eos_token_id=-1, pad_token_id=0)
    generation = generate(session, prompt, options)
    model.set_router_mode([2.0, 0.5])
    expected = model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=options)
    assert torch.equal(generation.sequence, expected)
    assert generation.usage is not None
    assert generation.usage.active_ratio_per_layer == model.active_ratio_per_layer
    assert model.active_ratio_per_layer[0] == 0.0


def test_proves_gates_that_layers_share_and_counts_each_layer(grouped: ExportResult) -> None:
    proved = grouped.verification
    assert proved.passed
    assert proved.equal_routes == 1.0
    assert proved.compared_routes == 3 * proved.compared_tokens
    assert 0 < proved.active_ratio < 1


def test_generates_with_shared_gates_what_pytorch_does(grouped: ExportResult) -> None:
    model = tiny_grouped("straight_through")
    session = RoutedSession(grouped.output / MODEL_FILE, providers=["CPUExecutionProvider"])
    assert session.gated_layers == GATED_LAYERS
    prompt = torch.tensor([[5, 6, 7, 200, 3, 41, 17]])
    options = GenerationConfig(max_new_tokens=12, do_sample=False, eos_token_id=-1, pad_token_id=0)
    for thresholds in ([0.5, 0.5], [0.0, 2.0], [2.0, 0.5]):
        session.thresholds = thresholds
        model.set_router_mode(thresholds)
        generation = generate(session, prompt, options)
        expected = model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=options)
        assert torch.equal(generation.sequence, expected)
        assert generation.usage is not None
        assert generation.usage.active_ratio_per_layer == model.active_ratio_per_layer


def test_proves_gates_that_are_decided_at_once(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also the one that is folded, in the middle of them."""
    monkeypatch.setattr(verification_inputs, "NUM_DECODE_STEPS", 1)
    folder = tmp_path / "routed"
    write_routed_folder(tiny_decided_at_once("straight_through"), tokenizer, folder)
    proved = export_folder(folder, folder / "onnx", ExportConfig(always_active="1", fold_gates="none")).verification
    assert proved.passed
    assert proved.equal_routes == 1.0
    assert proved.compared_routes == 2 * proved.compared_tokens
    assert 1 / 3 < proved.active_ratio < 1
    nodes = onnx.load(folder / "onnx" / MODEL_FILE, load_external_data=False).graph.node
    kinds = [node.op_type for node in nodes]
    assert (kinds.count("If"), kinds.count("ReduceMax")) == (2, 1)


@pytest.mark.parametrize("target", ["ort", "onnx"])
def test_proves_what_tokens_go_through_that_skip(
    target: Literal["ort", "onnx"],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also in a layer that is always skipped; an exporter that forgets an adapter changes the logits by far."""
    monkeypatch.setattr(verification_inputs, "NUM_DECODE_STEPS", 1)
    folder = tmp_path / "routed"
    model = tiny_adapted("straight_through")
    write_routed_folder(model, tokenizer, folder)
    config = ExportConfig(target=target, always_skipped="2", fold_gates="none")
    proved = export_folder(folder, folder / "onnx", config).verification
    assert proved.passed
    assert proved.equal_routes == 1.0
    session = RoutedSession(folder / "onnx" / MODEL_FILE, providers=["CPUExecutionProvider"])
    ids = np.array([[5, 6, 7, 200, 3, 41, 17]])
    session.thresholds = [2.0]
    model.set_router_mode([2.0, 2.0])
    mask = np.ones_like(ids)
    logits, _, _ = session.run(ids, mask, mask.cumsum(1) - 1, session.empty_cache(1))
    expected = model(torch.from_numpy(ids)).logits
    torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("target", "in_place"), [("ort", True), ("onnx", False)])
def test_proves_an_export_for_either_target(
    target: Literal["ort", "onnx"], in_place: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a model that ONNX Runtime has operators for; prompts are padded on either side in these proofs."""
    monkeypatch.setattr(verification_inputs, "NUM_DECODE_STEPS", 1)  # that saves time
    model = build_routed(wide_model("llama"), RouterConfig(router_hidden_size=8))
    write_routed_folder(model, None, tmp_path / "routed")
    result = export_folder(tmp_path / "routed", tmp_path / "onnx", ExportConfig(target=target))
    assert result.verification.passed
    assert not result.verification.never_seen
    assert RoutedSession(tmp_path / "onnx" / MODEL_FILE).model.in_place == in_place
    domains = {node.domain for node in onnx.load(tmp_path / "onnx" / MODEL_FILE, load_external_data=False).opset_import}
    assert domains == ({"", "com.microsoft"} if in_place else {""})


def test_writes_integer_weights_and_tells_what_they_lost(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a byte each, but for their scales and zero points."""
    monkeypatch.setattr(verification_inputs, "NUM_DECODE_STEPS", 1)  # that saves time
    result = export_folder(folder, tmp_path / "onnx", ExportConfig(weights="int4", group_size=16))
    proved = result.verification
    assert proved.passed
    assert names(result.output) == FILES
    report = read_report(folder)["export"]
    assert (report["weights"], report["group_size"]) == ("int4", 16)
    assert report["bytes"] == result.num_bytes
    assert result.num_bytes == sum((result.output / name).stat().st_size for name in (MODEL_FILE, f"{MODEL_FILE}.data"))
    tensors = onnx.load(result.output / MODEL_FILE).graph.initializer
    codes = [tensor for tensor in tensors if tensor.data_type == onnx.TensorProto.UINT8 and len(tensor.dims) == 3]
    weights = {name: parameter.numel() for name, parameter in tiny_base().named_parameters() if parameter.dim() == 2}
    # A layer that may be skipped has those of its keys and values once more, packed without the queries.
    twice = sum(count for name, count in weights.items() if "k_proj" in name or "v_proj" in name)
    once = sum(weights.values())
    assert once / 2 <= sum(len(tensor.raw_data) for tensor in codes) <= (once + twice) / 2
    *_, last = result.summary().splitlines()
    assert proved.perplexity_unrounded is not None
    assert last == (
        f"int4 weights in groups of 16 by rtn: on longer texts perplexity {proved.perplexity_rounded['onnx']:.3f} as "
        f"shipped, {proved.perplexity_unrounded:.3f} before rounding"
    )


def test_writes_weights_rounded_for_a_text(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the artifact computes what PyTorch does."""
    monkeypatch.setattr(verification_inputs, "NUM_DECODE_STEPS", 1)  # that saves time
    config = ExportConfig(weights="int4", rounding="gptq", group_size=32)
    result = export_folder(folder, tmp_path / "onnx", config)
    assert result.verification.passed
    report = read_report(folder)["export"]
    assert (report["weights"], report["rounding"], report["group_size"]) == ("int4", "gptq", 32)
    assert "\nint4 weights in groups of 32 by gptq: on longer texts perplexity" in result.summary()


def test_refuses_to_round_for_a_text_without_a_tokenizer(tmp_path: Path) -> None:
    write_routed_folder(tiny_routed("straight_through"), None, tmp_path / "routed")
    with pytest.raises(DataError, match=r"the model has no tokenizer .* or round to nearest"):
        export_folder(tmp_path / "routed", tmp_path / "onnx", ExportConfig(weights="int4", rounding="gptq"))
    assert not (tmp_path / "onnx").exists()


def test_writes_weights_in_half_of_the_bytes_and_tells_what_they_lost(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verification_inputs, "NUM_DECODE_STEPS", 1)  # that saves time
    result = export_folder(folder, tmp_path / "onnx", ExportConfig(weights="fp16"))
    proved = result.verification
    assert proved.passed
    tensors = onnx.load(result.output / MODEL_FILE).graph.initializer
    weights = [tensor for tensor in tensors if tensor.data_type == onnx.TensorProto.FLOAT16]
    base = [parameter.numel() for parameter in tiny_base().parameters() if parameter.dim() == 2]
    assert sum(len(tensor.raw_data) for tensor in weights) >= 2 * sum(base)
    assert not [
        tensor.name for tensor in tensors if tensor.data_type == onnx.TensorProto.FLOAT and "proj" in tensor.name
    ]
    *_, last = result.summary().splitlines()
    assert proved.perplexity_unrounded is not None
    assert last == (
        f"fp16 weights: on longer texts perplexity {proved.perplexity_rounded['onnx']:.3f} as shipped, "
        f"{proved.perplexity_unrounded:.3f} before rounding"
    )


def test_replaces_an_earlier_export(folder: Path, onnx_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_prebuilt(onnx_folder, monkeypatch)
    earlier = folder / "onnx"
    earlier.mkdir()
    (earlier / "verification.json").write_text("{}", encoding="utf-8")
    (earlier / "of_old").touch()
    result = export_folder(folder, earlier, ExportConfig())
    assert result.verification.passed
    assert names(earlier) == FILES


def test_writes_an_unproved_model_where_it_is_asked_for_and_says_that_it_is(
    folder: Path, onnx_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_prebuilt(onnx_folder, monkeypatch)
    output = folder / "onnx"
    result = export_folder(folder, output, ExportConfig(verify="none"))
    assert names(output) == FILES
    assert is_onnx_folder(output)
    assert stored(output)["passed"] is False
    assert stored(output)["result"].startswith("not verified: ")
    assert read_report(folder)["export"]["skipped"] is True
    wrote, told = result.summary().splitlines()
    assert "verifying" not in wrote
    assert told.startswith("not verified: ")
    assert export_folder(folder, output, ExportConfig()).verification.passed
    assert "result" not in stored(output)


def test_leaves_no_model_that_was_not_verified(
    folder: Path, onnx_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_prebuilt(onnx_folder, monkeypatch)
    output = folder / "onnx"
    shutil.copytree(onnx_folder, output)
    (output / "verification.json").write_text("{}", encoding="utf-8")
    with monkeypatch.context() as bounds:
        bounds.setattr(verification, "MAX_LOGIT_DIFFERENCE", -1.0)
        expected = r"does not compute what PyTorch does: logits differ by \S+, more than -1 .*\(no model was left; "
        with pytest.raises(VerificationError, match=expected):
            export_folder(folder, output, ExportConfig())
    assert names(output) == {"verification.json"}
    assert stored(output)["passed"] is False
    (failure,) = stored(output)["failures"]
    assert failure.startswith("logits differ by ")
    assert "export" not in read_report(folder)


def test_a_kill_leaves_what_was_there_and_the_next_export_cleans_up(
    folder: Path, onnx_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = folder / "onnx"
    output.mkdir()
    (output / "verification.json").write_text("{}", encoding="utf-8")
    script = """
import os, signal, sys
from pathlib import Path
from typing import Any, Literal
import onnx_ir as ir
from modcompile.export import export_folder as module
from modcompile.export.export_config import ExportConfig

module.build_model = lambda *_, **__: ir.load(sys.argv[2])  # what it would build
module.verify_model = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
module.export_folder(Path(sys.argv[1]), Path(sys.argv[1]) / "onnx", ExportConfig())
"""
    command = [sys.executable, "-c", script, str(folder), str(onnx_folder / MODEL_FILE)]
    killed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert names(output) == {"verification.json"}
    (partial,) = (path for path in folder.iterdir() if path.name.startswith(".onnx.partial-"))
    assert (partial / MODEL_FILE).is_file()

    use_prebuilt(onnx_folder, monkeypatch)
    export_folder(folder, output, ExportConfig())
    assert names(output) == FILES
    assert not partial.exists()


def test_a_folder_without_a_tokenizer_is_verified_on_random_tokens(
    folder: Path, onnx_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_prebuilt(onnx_folder, monkeypatch)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    result = export_folder(folder, folder / "onnx", ExportConfig())
    assert result.verification.passed
    assert names(folder / "onnx") == FILES - TOKENIZER - {"genai_config.json"}


def test_refuses_a_folder_of_somebody_else(folder: Path) -> None:
    foreign = folder / "onnx"
    foreign.mkdir()
    (foreign / "diary.txt").write_text("dear diary", encoding="utf-8")
    with pytest.raises(OutputError, match="exists and was not made by modcompile"):
        export_folder(folder, foreign, ExportConfig())
    assert names(foreign) == {"diary.txt"}


@pytest.mark.parametrize("up", [0, 1])
def test_never_replaces_the_routed_folder_or_what_holds_it(folder: Path, up: int) -> None:
    target, before = [folder, folder.parent][up], names(folder)
    with pytest.raises(OutputError, match=r"is or holds the folder that is exported; choose another --output_dir$"):
        export_folder(folder, target, ExportConfig(), overwrite=True)
    assert names(folder) == before


def test_a_folder_that_is_not_routed_gets_no_output(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="is not a folder"):
        export_folder(tmp_path / "nothing", tmp_path / "onnx", ExportConfig())
    assert not list(tmp_path.iterdir())


def test_writes_what_a_quantized_folder_chooses_precisions_by(precision_onnx_folder: Path) -> None:
    assert names(precision_onnx_folder) == FILES
    graph = onnx.load(precision_onnx_folder / MODEL_FILE, load_external_data=False).graph
    assert [value.name for value in graph.output][-3:] == ["precision.0", "precision.1", "precision.2"]
    proved = stored(precision_onnx_folder)
    assert proved["passed"] is True
    assert proved["failures"] == []
    assert proved["equal_routes"] == 1.0
    assert proved["active_ratio"] is None
    assert 2 < proved["average_bits"] < 16
    rounded = proved["perplexity_rounded"]
    assert rounded["onnx"] == pytest.approx(rounded["torch"], rel=proved["bounds"]["perplexity_change"])
    report = read_report(precision_onnx_folder.parent)["export"]
    assert report["passed"] is True
    assert report["average_bits"] == proved["average_bits"]


@pytest.fixture
def choosing_folder(precision_onnx_folder: Path, tmp_path: Path) -> Path:
    """A copy of a quantized folder with routers that decide, not yet exported."""
    ignore = shutil.ignore_patterns("onnx", "report.json")
    return Path(shutil.copytree(precision_onnx_folder.parent, tmp_path / "quantized", ignore=ignore))


def test_sums_up_average_bits(
    choosing_folder: Path, precision_onnx_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_prebuilt(precision_onnx_folder, monkeypatch)
    result = export_folder(choosing_folder, choosing_folder / "onnx", ExportConfig(emit_routing=True))
    proved = result.verification
    assert re.search(r"in ONNX Runtime, \d+\.\d\d bits on average$", result.summary())
    assert proved.average_bits == stored(precision_onnx_folder)["average_bits"]


def test_leaves_no_model_of_precisions_that_was_not_verified(
    choosing_folder: Path, precision_onnx_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_prebuilt(precision_onnx_folder, monkeypatch)
    output = choosing_folder / "onnx"
    monkeypatch.setattr(verification, "MAX_PERPLEXITY_CHANGE", -1.0)
    with pytest.raises(VerificationError, match=r"does not compute what PyTorch does: the perplexity differs by "):
        export_folder(choosing_folder, output, ExportConfig(emit_routing=True))
    assert names(output) == {"verification.json"}
    assert stored(output)["passed"] is False
    assert "export" not in read_report(choosing_folder)


def test_refuses_a_folder_of_look_up_tables(tmp_path: Path) -> None:
    write_any_precision(tiny_any_precision(), tmp_path / "tables")
    expected = r"is looked up in tables, which PyTorch alone serves; to export, quantize the original with modcompile"
    with pytest.raises(UnsupportedModelError, match=expected) as caught:
        export_folder(tmp_path / "tables", tmp_path / "onnx", ExportConfig())
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == {"tables"}


def test_stores_what_a_quantized_folder_has_not_quantized_in_half_of_the_bytes(
    choosing_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Embedding and head; with 16 bits to choose from, the original weights of blocks as well."""
    monkeypatch.setattr(verification_inputs, "NUM_DECODE_STEPS", 1)  # that saves time
    result = export_folder(choosing_folder, tmp_path / "onnx", ExportConfig(weights="fp16"))
    assert result.verification.passed
    tensors = onnx.load(result.output / MODEL_FILE).graph.initializer
    halves = [tensor for tensor in tensors if tensor.data_type == onnx.TensorProto.FLOAT16]
    base = {name: parameter.numel() for name, parameter in tiny_base().named_parameters() if parameter.dim() == 2}
    assert sum(len(tensor.raw_data) for tensor in halves) >= 2 * sum(base.values())
    assert any(tensor.data_type == onnx.TensorProto.UINT8 for tensor in tensors)
