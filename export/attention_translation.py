"""How operators for attention over a cache are spelled in ONNX.

https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.GroupQueryAttention
"""

from collections.abc import Callable
from typing import Any

import onnx
from onnxscript import opset23
from onnxscript.values import Op, Opset

from modcompile.export.quantized_translation import DOMAIN, VERSION
from modcompile.passes.gather_tokens import GATHER_TOKENS
from modcompile.passes.group_query_attention import GROUP_QUERY_ATTENTION

_Schema = onnx.defs.OpSchema
_OPTIONAL = _Schema.FormalParameterOption.Optional
_LENGTHS = ("seqlens_k", "total_sequence_length")
_SCHEMA = _Schema(
    "GroupQueryAttention",
    DOMAIN,
    VERSION,
    inputs=[
        _Schema.FormalParameter("query", "T"),
        *(
            _Schema.FormalParameter(name, "M" if name in _LENGTHS else "T", param_option=_OPTIONAL)
            for name in ("key", "value", "past_key", "past_value", *_LENGTHS, "cos_cache", "sin_cache")
        ),
    ],
    outputs=[_Schema.FormalParameter(name, "T") for name in ("output", "present_key", "present_value")],
    type_constraints=[("T", ["tensor(float)", "tensor(float16)"], ""), ("M", ["tensor(int32)"], "")],
    attributes=[
        *(
            _Schema.Attribute(name, _Schema.AttrType.INT, "")
            for name in ("num_heads", "kv_num_heads", "local_window_size", "do_rotary")
        ),
        _Schema.Attribute("scale", _Schema.AttrType.FLOAT, ""),
    ],
)
_GROUP_QUERY_ATTENTION = Op(Opset(DOMAIN, VERSION), "GroupQueryAttention", _SCHEMA)


def _attention(
    query: Any,
    key: Any | None,
    value: Any | None,
    past_key: Any,
    past_value: Any,
    seqlens_k: Any,
    total_sequence_length: Any,
    cos_cache: Any | None,
    sin_cache: Any | None,
    num_heads: int,
    kv_num_heads: int,
    scale: float,
    local_window_size: int,
) -> Any:
    return _GROUP_QUERY_ATTENTION(
        query,
        key,
        value,
        past_key,
        past_value,
        seqlens_k,
        total_sequence_length,
        cos_cache,
        sin_cache,
        num_heads=num_heads,
        kv_num_heads=kv_num_heads,
        scale=scale,
        local_window_size=local_window_size,
        do_rotary=int(cos_cache is not None),
    )


def _gather_tokens(x: Any, index: Any) -> Any:
    last: Any = opset23.Constant(value_ints=[-1])
    return opset23.GatherND(x, opset23.Unsqueeze(index, last), batch_dims=1)


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    GROUP_QUERY_ATTENTION: _attention,
    GATHER_TOKENS: _gather_tokens,
}
"""For the `custom_translation_table` of `torch.onnx.export`."""
