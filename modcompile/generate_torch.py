"""Continue a prompt in PyTorch, by a routed or a quantized folder."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig

from modcompile.artifacts import load_with_routers
from modcompile.counted_bits import CountedBits
from modcompile.devices import fastest_device
from modcompile.layerwise import LayerwiseQuantizeForCausalLM
from modcompile.modeling import RoutedForCausalLM
from modcompile.precision_output import PrecisionCausalLMOutput
from modcompile.progress import show_elapsed
from modcompile.text_generator import TextGenerator, describe_active_ratio
from modcompile.timed_streamer import TimedStreamer


def load_routed(folder: Path, hard_threshold: float | str | None) -> TextGenerator:
    """Of the graph of a routed folder, hard at a threshold, by default 0.5.

    Raises:
        ArtifactError: the folder is incomplete, damaged, or of another version.
        CheckpointError: its base can't be read.
    """
    with show_elapsed("loading and tracing"):
        model = load_with_routers(folder, 0.5 if hard_threshold is None else hard_threshold, device=fastest_device())
        model.hard_graph()  # lowered now, so that the prefill is timed without

    return TextGenerator(partial(_generate, model), lambda: describe_active_ratio(model.active_ratio))


def load_quantized(folder: Path, hard_threshold: float | None, num_bits: int | None) -> TextGenerator:
    """Of a folder of several precisions; its routers choose, unless all blocks are to have `num_bits`.

    Raises:
        ArtifactError: the folder is incomplete, damaged, or of another version.
        CheckpointError: its base can't be read.
        ConfigError: it lacks `num_bits`, or has no depth gates for a threshold.
    """
    with show_elapsed("loading and tracing"):
        precisions = None if num_bits is None else [num_bits]
        model = LayerwiseQuantizeForCausalLM.from_quantized(folder, precisions, device=fastest_device())
    if hard_threshold is not None:
        model.set_hard_threshold(hard_threshold)

    bits = CountedBits()

    def count(_model: nn.Module, _inputs: Any, output: PrecisionCausalLMOutput) -> None:
        assert output.num_bits is not None and output.tokens is not None
        bits.update(output.num_bits, output.tokens)

    model.register_forward_hook(count)
    return TextGenerator(partial(_generate, model), bits.describe)


def _generate(
    model: RoutedForCausalLM | LayerwiseQuantizeForCausalLM,
    input_ids: torch.Tensor,
    config: GenerationConfig,
    streamer: TimedStreamer,
) -> None:
    # Else transformers fills in what `config` leaves open from the model's own.
    model.generation_config = config
    tokens = input_ids.to(model.device)
    model.generate(tokens, attention_mask=torch.ones_like(tokens), streamer=streamer)
