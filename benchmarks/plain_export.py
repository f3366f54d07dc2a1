"""What people get without modcompile: the whole model through `torch.onnx.export`, with its keys and values."""

from pathlib import Path

import torch
from transformers import PreTrainedModel

from modcompile.export.quiet_exporter import quiet_exporter
from modcompile.passes import drop_guards
from modcompile.tracing import cache_shapes, trace_causal_lm

_BATCH, _TOKENS, _PAST = 2, 3, 5


def plain_export(base: PreTrainedModel, path: Path) -> None:
    """Write `base` to `path`, with inputs and outputs named as in our own exports."""
    shapes = cache_shapes(base)
    names = [f"{layer}.{part}" for layer in range(len(shapes)) for part in ("key", "value")]
    total = _PAST + _TOKENS
    tokens = torch.ones(_BATCH, _TOKENS, dtype=torch.int64), torch.ones(_BATCH, total, dtype=torch.int64)
    positions = torch.arange(_PAST, total).expand(_BATCH, _TOKENS).clone()
    past = [
        torch.zeros(_BATCH, heads, _PAST, size)
        for heads, key_size, value_size in shapes
        for size in (key_size, value_size)
    ]
    dynamic = torch.export.Dim.AUTO
    two = {0: dynamic, 1: dynamic}
    with quiet_exporter(), torch.no_grad():
        program = torch.onnx.export(
            drop_guards(trace_causal_lm(base)),
            (*tokens, positions, *past),
            dynamo=True,
            dynamic_shapes=(two, two, two, *({0: dynamic, 2: dynamic} for _ in past)),
            input_names=["input_ids", "attention_mask", "position_ids", *(f"past_key_values.{name}" for name in names)],
            output_names=["logits", *(f"present.{name}" for name in names)],
            verbose=False,
        )
    assert program is not None
    program.save(path, external_data=True)
