"""What each runtime makes of a folder for `modcompile.generate`."""

from collections.abc import Callable

import torch
from transformers import GenerationConfig

from modcompile.timed_streamer import TimedStreamer

TextGenerator = Callable[[torch.Tensor, GenerationConfig, TimedStreamer], str]
"""Continues a prompt `[1, T]`, and says in a few words how much of the model that took."""


def describe_active_ratio(active_ratio: float) -> str:
    """The share of tokens and routed layers that were executed, in words."""
    return f"active ratio {active_ratio:.3f}"
