"""How a sum and its root-mean-square norm are spelled in ONNX: as one operator of ONNX Runtime.

https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.SkipSimplifiedLayerNormalization
"""

from collections.abc import Callable
from typing import Any

import onnx
from onnxscript.values import Op, Opset

from modcompile.export.quantized_translation import DOMAIN, VERSION
from modcompile.passes.fuse_skip_norm import SKIP_RMS_NORM

_Schema = onnx.defs.OpSchema
_OUTPUTS = ("output", "mean", "inv_std_var", "input_skip_bias_sum")
_SKIP_NORM = Op(
    Opset(DOMAIN, VERSION),
    "SkipSimplifiedLayerNormalization",
    _Schema(
        "SkipSimplifiedLayerNormalization",
        DOMAIN,
        VERSION,
        inputs=[_Schema.FormalParameter(name, "T") for name in ("input", "skip", "gamma")],
        outputs=[_Schema.FormalParameter(name, "T") for name in _OUTPUTS],
        type_constraints=[("T", ["tensor(float)", "tensor(float16)"], "")],
        attributes=[_Schema.Attribute("epsilon", _Schema.AttrType.FLOAT, "")],
    ),
)


def _translate(x: Any, skip: Any, weight: Any, eps: float) -> Any:
    output, _, _, total = _SKIP_NORM(x, skip, weight, epsilon=eps, _outputs=len(_OUTPUTS))
    return output, total


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {SKIP_RMS_NORM: _translate}
"""For the `custom_translation_table` of `torch.onnx.export`."""
