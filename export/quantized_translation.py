"""How quantized weights are spelled in ONNX: as ONNX Runtime's `MatMulNBits` and `GatherBlockQuantized`.

https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.MatMulNBits
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.GatherBlockQuantized
"""

from collections.abc import Callable
from typing import Any

import onnx
from onnxscript import opset23 as op
from onnxscript.values import Op, Opset

from modcompile.passes.quantized_ops import GATHER_BLOCK_QUANTIZED, MATMUL_NBITS

DOMAIN = "com.microsoft"
VERSION = 1
_ACCURACY = 4
"""Activations as int8: ONNX Runtime multiplies codes by floats up to eighty times slower."""

_Parameter = onnx.defs.OpSchema.FormalParameter
_OPTIONAL = onnx.defs.OpSchema.FormalParameterOption.Optional
_FLOATS, _CODES, _IDS = ["tensor(float)", "tensor(float16)"], ["tensor(uint8)"], ["tensor(int32)", "tensor(int64)"]


def _operator(name: str, inputs: list[Any], types: dict[str, list[str]], attributes: tuple[str, ...]) -> Op:
    schema = onnx.defs.OpSchema(
        name,
        DOMAIN,
        VERSION,
        inputs=inputs,
        outputs=[_Parameter("Y", "T1")],
        type_constraints=[(variable, allowed, "") for variable, allowed in types.items()],
        attributes=[
            onnx.defs.OpSchema.Attribute(attribute, onnx.defs.OpSchema.AttrType.INT, "") for attribute in attributes
        ],
    )
    return Op(Opset(DOMAIN, VERSION), name, schema)


_MATMUL_NBITS = _operator(
    "MatMulNBits",
    [
        _Parameter("A", "T1"),
        _Parameter("B", "T2"),
        _Parameter("scales", "T1"),
        _Parameter("zero_points", "T2", param_option=_OPTIONAL),
    ],
    {"T1": _FLOATS, "T2": _CODES},
    ("K", "N", "bits", "block_size", "accuracy_level"),
)
_GATHER_BLOCK_QUANTIZED = _operator(
    "GatherBlockQuantized",
    [
        _Parameter("data", "T2"),
        _Parameter("indices", "Tind"),
        _Parameter("scales", "T1"),
        _Parameter("zero_points", "T2", param_option=_OPTIONAL),
    ],
    {"T1": _FLOATS, "T2": _CODES, "Tind": _IDS},
    ("bits", "block_size", "gather_axis", "quantize_axis"),
)


def _matmul_nbits(x: Any, packed: Any, scales: Any, zero_points: Any | None, num_bits: int) -> Any:
    return _MATMUL_NBITS(
        x,
        packed,
        scales,
        zero_points,
        K=int(x.shape[-1]),
        N=int(packed.shape[0]),
        bits=num_bits,
        block_size=_group_size(packed, num_bits),
        accuracy_level=_ACCURACY,
    )


def _gather_block_quantized(
    ids: Any, packed: Any, scales: Any, zero_points: Any | None, num_bits: int, width: int
) -> Any:
    # The layout of MatMulNBits, so that a head can share it; ONNX Runtime reshapes constants when a session starts.
    shape: Any = op.Constant(value_ints=[int(packed.shape[0]), -1])
    data = op.Reshape(packed, shape)
    group_size = _group_size(packed, num_bits)
    rows = _GATHER_BLOCK_QUANTIZED(
        data, ids, scales, zero_points, bits=num_bits, block_size=group_size, gather_axis=0, quantize_axis=1
    )
    if width % group_size == 0:
        return rows
    bounds: list[Any] = [op.Constant(value_ints=[value]) for value in (0, width, -1)]
    return op.Slice(rows, *bounds)


def _group_size(packed: Any, num_bits: int) -> int:
    return int(packed.shape[2]) * 8 // num_bits


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    MATMUL_NBITS: _matmul_nbits,
    GATHER_BLOCK_QUANTIZED: _gather_block_quantized,
}
"""For the `custom_translation_table` of `torch.onnx.export`."""
