"""Write an ONNX model with its weights in a file beside it, and what its shapes depend on in the model itself."""

from pathlib import Path

import onnx_ir as ir

_LARGEST_INSIDE = 2048
"""Bytes. ONNX Runtime infers shapes before it reads the file of weights, and refuses a `Split` whose sizes, of as many
integers as there are gates, lie there: by onnx_ir's default of 256 bytes, those of more than 32 gates; here, of more
than 256."""


def write_model(model: ir.Model, path: Path, external_data: str) -> None:
    """Write `path`, and weights into a file named `external_data` in the same folder."""
    ir.save(model, path, external_data=external_data, size_threshold_bytes=_LARGEST_INSIDE)
