"""What each runtime makes of a folder for `modcompile.generate`."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import GenerationConfig

from modcompile.timed_streamer import TimedStreamer


@dataclass(frozen=True)
class TextGenerator:
    """A model that continues one prompt."""

    generate: Callable[[torch.Tensor, GenerationConfig, TimedStreamer], None]
    """Continues a prompt `[1, T]`, every token of which the streamer gets."""
    describe: Callable[[], str]
    """Says in a few words how much of the model was used so far, from the first new token on."""


def describe_active_ratio(active_ratio: float) -> str:
    """The share of tokens and routed layers that were executed, in words."""
    return f"active ratio {active_ratio:.3f}"
