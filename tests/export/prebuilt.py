"""Exports that take an ONNX model from a folder instead of building it, and verify it on little: that saves time."""

from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnx_ir.passes.common as common_passes
import pytest
from torch import fx

from modcompile.export import export_folder, verification_inputs
from modcompile.export.session import MODEL_FILE


def use_prebuilt(onnx_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`onnx_folder` must be of the model that is exported, with --emit_routing."""

    def build_model(_: fx.GraphModule, *, emit_routing: bool, **options: Any) -> ir.Model:
        model = ir.load(onnx_folder / MODEL_FILE)
        if not emit_routing:
            told = ("routing.", "precision.")
            model.graph.outputs[:] = [value for value in model.graph.outputs if not str(value.name).startswith(told)]
            common_passes.RemoveUnusedNodesPass()(model)
        return model

    monkeypatch.setattr(export_folder, "build_model", build_model)
    monkeypatch.setattr(verification_inputs, "NUM_DECODE_STEPS", 1)
