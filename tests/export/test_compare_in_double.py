import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from modcompile.export.compare_in_double import errors_to_double
from modcompile.export.depth_subject import DepthSubject
from modcompile.export.session import MODEL_FILE, RoutedSession
from modcompile.export.verification_inputs import NUM_TEXTS, Case, verification_cases
from modcompile.modeling import RoutedForCausalLM
from tests.export.telling import telling_session
from tests.tiny_routed import ROUTED_LAYERS, tiny_routed

TEXTS = [[(row * 37 + index * 11) % 300 for index in range(100)] for row in range(8)]


@pytest.fixture(scope="module")
def model() -> RoutedForCausalLM:
    model = tiny_routed("straight_through")
    model.set_router_mode(0.5)
    return model


@pytest.fixture(scope="module")
def cases(model: RoutedForCausalLM) -> list[Case]:
    """A row alone, twice under one name, and a batch; one decode step each."""
    cases = verification_cases(model, TEXTS, [0.5, 0.5])
    return [replace(case, decodes=tuple(row[:1] for row in case.decodes)) for case in (*cases[3:5], cases[NUM_TEXTS])]


def _session(folder: Path, scratch: Path) -> RoutedSession:
    return telling_session(folder, scratch, [range(layer, layer + 1) for layer in ROUTED_LAYERS])


def test_sound_runtimes_are_wrong_by_rounding(
    model: RoutedForCausalLM, onnx_folder: Path, cases: list[Case], tmp_path: Path
) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    errors = errors_to_double(DepthSubject(model), model, _session(onnx_folder, tmp_path / "telling"), cases)
    assert errors.keys() == {case.name for case in cases}
    for error in errors.values():
        assert 0 < error["torch"] < 1e-5
        assert 0 < error["onnx"] < 4 * error["torch"]
    assert model.dtype == torch.float32
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.hard_thresholds == [0.5, 0.5]


def test_a_mistake_is_far_from_the_truth(
    model: RoutedForCausalLM, onnx_folder: Path, cases: list[Case], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(onnx_folder, tmp_path / "onnx"))
    onnx_model = ir.load(folder / MODEL_FILE)
    weight = onnx_model.graph.initializers["epilogue.model.lm_head.weight"]
    assert weight.const_value is not None
    array = weight.const_value.numpy().copy()
    array[0, 0] += 0.1
    weight.const_value = ir.tensor(array, name=weight.name)
    ir.save(onnx_model, folder / MODEL_FILE)
    errors = errors_to_double(DepthSubject(model), model, _session(folder, tmp_path / "telling"), cases[:1])
    error = errors[cases[0].name]
    assert error["torch"] < 1e-5
    assert error["onnx"] > 100 * error["torch"]
    assert np.isfinite(error["onnx"])
