"""Measure a routed model in other modes than the one it is in."""

from collections.abc import Iterator
from contextlib import contextmanager

from modcompile.modeling import RoutedForCausalLM


@contextmanager
def restored_routing(model: RoutedForCausalLM) -> Iterator[None]:
    """Give the model its router mode and its usage back in the end."""
    thresholds, usage = model.hard_thresholds, model.usage
    try:
        yield
    finally:
        model.set_router_mode(thresholds)
        model.usage = usage
