"""How taking open tokens out of a call, and putting them back, is spelled in ONNX."""

from collections.abc import Callable
from typing import Any

from onnxscript import opset23

from modcompile.passes.open_tokens import GATHER_OPEN, OPEN_TOKENS, SCATTER_OPEN


def _open_tokens(is_open: Any) -> Any:
    last: Any = opset23.Constant(value_ints=[2])
    return opset23.Transpose(opset23.NonZero(opset23.Squeeze(is_open, last)), perm=[1, 0])


def _gather_open(x: Any, places: Any) -> Any:
    return opset23.GatherND(x, places)


def _scatter_open(x: Any, places: Any, values: Any) -> Any:
    return opset23.ScatterND(x, places, values)


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    OPEN_TOKENS: _open_tokens,
    GATHER_OPEN: _gather_open,
    SCATTER_OPEN: _scatter_open,
}
"""For the `custom_translation_table` of `torch.onnx.export`."""
