"""How products with quantized weights are spelled in ONNX: as ONNX Runtime's `MatMulNBits`.

https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.MatMulNBits
"""

from collections.abc import Callable
from typing import Any

import onnx
from onnxscript.values import Op, Opset

from modcompile.passes.quantized_ops import MATMUL_NBITS

DOMAIN = "com.microsoft"
VERSION = 1
_ACCURACY = 4
"""Activations as int8: ONNX Runtime multiplies codes by floats up to eighty times slower."""

_Parameter = onnx.defs.OpSchema.FormalParameter
_OPTIONAL = onnx.defs.OpSchema.FormalParameterOption.Optional
_SCHEMA = onnx.defs.OpSchema(
    "MatMulNBits",
    DOMAIN,
    VERSION,
    inputs=[
        _Parameter("A", "T1"),
        _Parameter("B", "T2"),
        _Parameter("scales", "T1"),
        _Parameter("zero_points", "T2", param_option=_OPTIONAL),
    ],
    outputs=[_Parameter("Y", "T1")],
    type_constraints=[("T1", ["tensor(float)", "tensor(float16)"], ""), ("T2", ["tensor(uint8)"], "")],
    attributes=[
        onnx.defs.OpSchema.Attribute(name, onnx.defs.OpSchema.AttrType.INT, "")
        for name in ("K", "N", "bits", "block_size", "accuracy_level")
    ],
)
_MATMUL_NBITS = Op(Opset(DOMAIN, VERSION), "MatMulNBits", _SCHEMA)


def _translate(x: Any, packed: Any, scales: Any, zero_points: Any | None, num_bits: int) -> Any:
    rows, _, size = packed.shape
    return _MATMUL_NBITS(
        x,
        packed,
        scales,
        zero_points,
        K=int(x.shape[-1]),
        N=int(rows),
        bits=num_bits,
        block_size=int(size) * 8 // num_bits,
        accuracy_level=_ACCURACY,
    )


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {MATMUL_NBITS: _translate}
"""For the `custom_translation_table` of `torch.onnx.export`."""
