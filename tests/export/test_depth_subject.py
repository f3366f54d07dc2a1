"""What is exported of routed models with integer weights is verified, and what was tampered with is found out."""

import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from modcompile.export import verification
from modcompile.export.build_model import build_model
from modcompile.export.export_config import ExportConfig
from modcompile.export.exportable import Exportable, load_exportable
from modcompile.export.session import MODEL_FILE
from modcompile.export.verification import Verification
from modcompile.export.verification_inputs import NUM_TEXTS
from modcompile.export.verify_model import verify_model

TEXTS = [[(row * 37 + index * 11) % 300 for index in range(100)] for row in range(NUM_TEXTS)]
CHANGED = r"the perplexity differs by \S+%, more than -\d+\.\d% \(.+\)"


@dataclass(frozen=True)
class Exported:
    """A model on integer weights, and what was exported of it."""

    loaded: Exportable
    folder: Path

    def verify(self) -> Verification:
        """Two rows alone, the batches with three rows of the eight, and one decode step: that saves time."""
        proof = self.loaded.proof
        assert proof is not None
        short = [replace(case, decodes=tuple(row[:1] for row in case.decodes)) for case in proof.cases]
        batches = [replace(case, prefills=case.prefills[1:4], decodes=case.decodes[1:4]) for case in short[NUM_TEXTS:]]
        return verify_model(proof.subject, self.folder, [*short[3:5], *batches])


@pytest.fixture(scope="module", params=["int4", "int8"])
def exported(request: pytest.FixtureRequest, routed_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    loaded = load_exportable(routed_folder, ExportConfig(weights=request.param), lambda _: TEXTS)
    folder = tmp_path_factory.mktemp("built")
    ir.save(build_model(loaded.graph()), folder / MODEL_FILE, external_data=f"{MODEL_FILE}.data")
    return Exported(loaded, folder)


@pytest.fixture
def copy(exported: Exported, tmp_path: Path) -> Exported:
    """To be tampered with."""
    return replace(exported, folder=Path(shutil.copytree(exported.folder, tmp_path / "copy")))


def loss(logits: torch.Tensor, row: list[int]) -> float:
    return float(torch.nn.functional.cross_entropy(logits[0, :-1], torch.tensor(row[1:])))


def test_passes_what_was_exported(exported: Exported) -> None:
    files = sorted(exported.folder.iterdir())
    result = exported.verify()
    assert result.failures == []
    assert result.never_seen == {}
    assert result.equal_routes == 1.0
    assert 0 < result.max_logit_difference < 1e-4
    assert list(result.perplexities_forced) == ["all executed", "all skipped", "every other one"]
    assert 0 < result.perplexity_noise < 0.02
    assert sorted(exported.folder.iterdir()) == files


def test_tells_the_perplexity_of_the_artifact_as_it_is(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    """And of PyTorch with activations rounded alike, and before weights were rounded."""
    monkeypatch.setattr(verification, "MAX_PERPLEXITY_CHANGE", -1.0)
    monkeypatch.setattr(verification, "MAX_FORCED_CHANGE", -1.0)
    result = exported.verify()
    assert all(re.fullmatch(CHANGED, failure) for failure in result.failures)
    assert len(result.failures) == 1 + len(result.perplexities_forced)
    session = ort.InferenceSession(str(exported.folder / MODEL_FILE), providers=["CPUExecutionProvider"])
    losses = []
    for row in TEXTS:
        ids = np.array([row])
        feeds: dict[str, np.ndarray] = {
            value.name: np.zeros((1, 2, 0, 8), np.float32)
            for value in session.get_inputs()
            if value.name.startswith("past_key_values.")
        }
        feeds |= {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(len(row))[None]}
        losses.append(loss(torch.from_numpy(session.run(["logits"], feeds)[0]), row))
    rounded = result.perplexity_rounded
    assert rounded["onnx"] == pytest.approx(float(np.exp(np.mean(losses))), rel=1e-5)
    assert rounded["torch"] == pytest.approx(rounded["onnx"], rel=0.01)


def test_tells_the_perplexity_before_rounding(exported: Exported, routed_folder: Path) -> None:
    proof = load_exportable(routed_folder, ExportConfig(), lambda _: TEXTS).proof
    assert proof is not None
    original = proof.subject
    before = [loss(original(torch.tensor([row])).logits, row) for row in TEXTS]
    assert exported.verify().perplexity_unrounded == pytest.approx(float(np.exp(np.mean(before))), rel=1e-5)


@pytest.mark.parametrize(
    "name",
    [
        "prologue.model.model.embed_tokens.weight_packed",
        "blocks.2.then_branch.block.mlp.gate_proj.weight_packed",
        "epilogue.model.lm_head.weight_packed",
    ],
)
def test_fails_where_a_weight_is_another(copy: Exported, name: str) -> None:
    weight = ir.load(copy.folder / MODEL_FILE).graph.initializers[name].const_value
    assert isinstance(weight, ir.ExternalTensor)
    with (copy.folder / weight.location).open("r+b") as data:
        data.seek(weight.offset or 0)
        data.write(bytes(byte ^ 0x3F for byte in weight.tobytes()))
    result = copy.verify()
    assert any(re.fullmatch(r"logits differ by \S+, more than 0\.001 \(.+\)", failure) for failure in result.failures)
