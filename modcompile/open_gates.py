"""Run a model of several precisions without its depth gates, which then decide again."""

from collections.abc import Iterator
from contextlib import contextmanager

from modcompile.layerwise import LayerwiseQuantizeForCausalLM


@contextmanager
def open_gates(model: LayerwiseQuantizeForCausalLM) -> Iterator[None]:
    """While this lasts, `infer_forward` executes every block; afterwards thresholds are what they were.

    Bits that are fixed are then those that each token is computed with. A model without gates is left alone.
    """
    thresholds = model.hard_thresholds
    if not thresholds:
        yield
        return
    model.set_hard_threshold(0.0)
    try:
        yield
    finally:
        model.set_hard_threshold(thresholds)
