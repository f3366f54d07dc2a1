"""Sessions that tell which branches ran, as a verification has them."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir

from modcompile.export.session import MODEL_FILE, RoutedSession
from modcompile.export.tell_routes import TellRoutes


def telling_session(source: Path, scratch: Path, gated_layers: Sequence[range]) -> RoutedSession:
    """Of a copy of an exported folder in `scratch`, which must not exist."""
    shutil.copytree(source, scratch)
    model = ir.load(scratch / MODEL_FILE)
    TellRoutes(gated_layers)(model)
    ir.save(model, scratch / MODEL_FILE)
    return RoutedSession(scratch / MODEL_FILE, providers=["CPUExecutionProvider"])
