"""Generate text with an exported model in ONNX Runtime, as transformers' `generate` does in PyTorch."""

from dataclasses import dataclass
from time import perf_counter

import numpy as np
import torch
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from modcompile.counted_bits import CountedBits
from modcompile.errors import ConfigError
from modcompile.export.decoder import Decoder
from modcompile.export.next_tokens import NextTokens
from modcompile.export.session import RoutedSession
from modcompile.export.step_binding import Array
from modcompile.export.told_counts import ToldCounts
from modcompile.usage import RoutingUsage


@dataclass(frozen=True)
class Generation:
    """What was generated, how much of the model that took, and how long."""

    sequence: torch.Tensor
    """Prompts and new tokens, `[B, T + N]`; after the end of a row, padding."""
    usage: RoutingUsage | None
    """None where the artifact has no routing masks, or does not tell them."""
    bits: CountedBits | None
    """None where the artifact does not choose precisions, or does not tell them."""
    prefill_seconds: float
    """Until the first new tokens were chosen."""
    decode_seconds: float
    """From then on."""


def generate(
    session: RoutedSession,
    input_ids: torch.Tensor,
    config: GenerationConfig,
    *,
    attention_mask: torch.Tensor | None = None,
    streamer: BaseStreamer | None = None,
    generator: torch.Generator | None = None,
    counts: ToldCounts | None = None,
) -> Generation:
    """Continue prompts `[B, T]`, each until a token of `config.eos_token_id`, or for `config.max_new_tokens`.

    `attention_mask`, `[B, T]` too, has zeros where a prompt is padded, on its left or its right; each row gets the
    tokens that it would get alone. A row that ended goes on with `config.pad_token_id`, by default the first end.

    Greedy, or with `do_sample` sampling by `temperature`, `top_k` and `top_p` from `generator` (by default PyTorch's
    own); no other field of `config` is looked at. The streamer gets the prompts first, then every step's tokens `[B]`.
    Who gives `counts` can read there, at every token, what is counted so far.

    Raises:
        ArtifactError: ONNX Runtime stops in the middle of the model.
        ConfigError: the mask has another shape than the prompts, or a prompt has no token.
    """
    tokens = _checked_mask(input_ids, attention_mask)
    next_tokens = NextTokens(config, generator)
    ends, padding = _ends_and_padding(config)
    counts = ToldCounts(session) if counts is None else counts
    batch, length = input_ids.shape
    decoder = Decoder(session, batch, capacity=length + config.max_new_tokens)
    if streamer is not None:
        streamer.put(input_ids)
    start = prefilled = perf_counter()
    ids = input_ids.numpy()
    # The logits that matter are of each row's last token, on the right of which there may be padding.
    padded = tokens[:, ::-1].argmax(1).tolist()
    running = np.ones(batch, bool)
    columns = [ids]
    for index in range(config.max_new_tokens):
        logits, told = decoder.step(ids, tokens, logits_to_keep=max(padded) + 1)
        counts.update(told, tokens)
        chosen = next_tokens.choose([row[-1 - skipped] for row, skipped in zip(logits, padded, strict=True)])
        ids = np.where(running, chosen, padding)[:, None]
        columns.append(ids)
        if streamer is not None:
            streamer.put(torch.from_numpy(ids[:, 0]))
        if index == 0:
            prefilled = perf_counter()
        running &= [token not in ends for token in chosen]
        if not running.any():
            break
        # A row that ended has padding from then on: not counted, and not computed where blocks are skipped.
        tokens, padded = running[:, None].astype(np.int64), [0] * batch
    if streamer is not None:
        streamer.end()
    sequence = torch.from_numpy(np.concatenate(columns, 1))
    return Generation(sequence, counts.usage, counts.bits, prefilled - start, perf_counter() - prefilled)


def _checked_mask(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> Array:
    """With ones for tokens, `[B, T]`."""
    if attention_mask is None:
        return np.ones(input_ids.shape, np.int64)
    if attention_mask.shape != input_ids.shape:
        raise ConfigError(
            f"the attention mask is {list(attention_mask.shape)}, but the prompts are {list(input_ids.shape)}; "
            "give one number for each token"
        )
    tokens = (attention_mask != 0).long()
    empty = (tokens.sum(1) == 0).nonzero().flatten().tolist()
    if empty:
        raise ConfigError(f"the attention mask leaves no token of prompt {empty[0]}; give some text to continue")
    return tokens.numpy()


def _ends_and_padding(config: GenerationConfig) -> tuple[list[int], int]:
    """The tokens that end a row, and the one that follows them."""
    eos = config.eos_token_id
    ends = eos if isinstance(eos, list) else [] if eos is None else [eos]
    return ends, config.pad_token_id if config.pad_token_id is not None else next(iter(ends), 0)
