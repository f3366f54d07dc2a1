"""Generate text with an exported model in ONNX Runtime, as transformers' `generate` does in PyTorch."""

from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer

from modcompile.counted_bits import CountedBits
from modcompile.export.session import PRECISION, ROUTING, Array, RoutedSession
from modcompile.layer_ranges import name_of
from modcompile.usage import RoutingUsage


@dataclass(frozen=True)
class Generation:
    """What was generated, and how much of the model that took."""

    sequence: torch.Tensor
    """Prompt and new tokens, `[1, T + N]`."""
    usage: RoutingUsage | None
    """None where the artifact has no routing masks, or does not tell them."""
    bits: CountedBits | None
    """None where the artifact does not choose precisions, or does not tell them."""


def generate(
    session: RoutedSession,
    input_ids: torch.Tensor,
    config: GenerationConfig,
    *,
    streamer: BaseStreamer | None = None,
    generator: torch.Generator | None = None,
) -> Generation:
    """Continue a prompt `[1, T]` until a token of `config.eos_token_id`, or for `config.max_new_tokens`.

    Greedy, or with `do_sample` sampling by `temperature`, `top_k` and `top_p` from `generator` (by default PyTorch's
    own); no other field of `config` is looked at. The streamer gets the prompt first, then every token.
    """
    processors = _logits_processors(config)
    routed_layers = tuple(layer for layers in session.gated_layers for layer in layers)
    usage = RoutingUsage(routed_layers) if routed_layers else None
    bits = CountedBits() if session.precision_layers else None
    eos = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if streamer is not None:
        streamer.put(input_ids)
    sequence, new_tokens = input_ids, input_ids
    cache = session.empty_cache(1)
    for _ in range(config.max_new_tokens):
        attention_mask = np.ones(sequence.shape, np.int64)
        position_ids = np.arange(sequence.shape[1])[None, -new_tokens.shape[1] :]
        logits, cache, told = session.run(new_tokens.numpy(), attention_mask, position_ids, cache)
        if usage is not None:
            masks = [
                torch.from_numpy(told[f"{ROUTING}{name_of(layers)}"])[..., None]
                for layers in session.gated_layers
                for _ in layers
            ]
            usage.update(masks, torch.ones_like(new_tokens))
        if bits is not None:
            told_bits = [torch.from_numpy(told[f"{PRECISION}{layer}"]) for layer in session.precision_layers]
            bits.update(told_bits, torch.ones_like(new_tokens))
        next_token = _choose(logits, sequence, processors, sample=bool(config.do_sample), generator=generator)
        new_tokens = next_token[None]
        sequence = torch.cat([sequence, new_tokens], 1)
        if streamer is not None:
            streamer.put(next_token)
        if next_token.item() in eos:
            break
    if streamer is not None:
        streamer.end()
    return Generation(sequence, usage, bits)


def _choose(
    logits: Array,
    sequence: torch.Tensor,
    processors: LogitsProcessorList,
    *,
    sample: bool,
    generator: torch.Generator | None,
) -> torch.Tensor:
    """The next token, `[1]`, after logits `[1, T, V]`."""
    scores = processors(cast(torch.LongTensor, sequence), torch.from_numpy(logits[:, -1]).float())
    if not sample:
        return scores.argmax(-1)
    return torch.multinomial(scores.softmax(-1), 1, generator=generator)[0]


def _logits_processors(config: GenerationConfig) -> LogitsProcessorList:
    """Those that transformers would apply, in its order."""
    processors = LogitsProcessorList()
    if config.do_sample:
        if config.temperature is not None and config.temperature != 1:
            processors.append(TemperatureLogitsWarper(config.temperature))
        if config.top_k:
            processors.append(TopKLogitsWarper(config.top_k))
        if config.top_p is not None and config.top_p < 1:
            processors.append(TopPLogitsWarper(config.top_p))
    return processors
