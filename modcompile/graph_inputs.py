"""From the arguments that transformers calls a model with to those of a traced graph, and back."""

from collections.abc import Sequence

import torch
from torch import fx
from transformers import Cache, DynamicCache

from modcompile.passes.outlined_form import NUM_TOKEN_INPUTS
from modcompile.tracing import from_cache, to_cache


def cache_inputs(graph: fx.GraphModule) -> list[fx.Node]:
    """The placeholders of past keys and values; none if the graph was traced without."""
    return list(graph.graph.find_nodes(op="placeholder"))[NUM_TOKEN_INPUTS:]


def graph_inputs(
    graph: fx.GraphModule,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    cache: Cache | None = None,
) -> tuple[torch.Tensor, ...]:
    """All inputs of `graph` for `input_ids [B, T]` after a cache of P tokens; `attention_mask` is `[B, P + T]`.

    Without a mask every token counts; without positions they are counted from the mask.
    """
    past_length = cache.get_seq_length() if cache is not None else 0
    batch, length = input_ids.shape
    if attention_mask is None:
        attention_mask = input_ids.new_ones(batch, past_length + length)
    attention_mask = attention_mask.long()
    if position_ids is None:
        position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    position_ids = position_ids[:, -length:].expand(batch, -1)
    return input_ids, attention_mask, position_ids, *_past(graph, cache, batch, input_ids.device)


def updated_cache(cache: DynamicCache | None, present: Sequence[torch.Tensor]) -> DynamicCache:
    """The caller's cache, or a new one, holding `present`.

    Its layers become plain ones: what a sliding window may forget is for the attention mask to say, not for the cache.
    """
    filled = to_cache(list(zip(present[::2], present[1::2], strict=True)))
    if cache is None:
        return filled
    cache.layers = filled.layers
    return cache


def _past(graph: fx.GraphModule, cache: Cache | None, batch: int, device: torch.device) -> list[torch.Tensor]:
    if cache is not None and cache.get_seq_length() > 0:
        return [tensor for pair in from_cache(cache) for tensor in pair]
    empty = []
    for node in cache_inputs(graph):
        value = node.meta["val"]
        shape = (batch, int(value.shape[1]), 0, int(value.shape[3]))
        empty.append(torch.empty(shape, dtype=value.dtype, device=device))
    return empty
