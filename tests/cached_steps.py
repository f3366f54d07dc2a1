"""A prefill and steps of decoding behind it, in a graph and in another that should compute the same."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import fx
from transformers import PreTrainedModel

from modcompile.tracing import cache_shapes
from tests.model_inputs import Padding

_Shapes = list[tuple[int, int, int]]


@cache
def _cache_shapes(model: PreTrainedModel) -> _Shapes:
    return cache_shapes(model)


@dataclass(frozen=True)
class Step:
    """The tokens of one call; `is_token [B, T]` says which of them are no padding."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor

    @property
    def is_token(self) -> torch.Tensor:
        return self.attention_mask[:, -self.input_ids.shape[1] :].bool()


def steps(model: PreTrainedModel, padding: Padding, batch: int = 3, lengths: Sequence[int] = (5, 1, 1)) -> list[Step]:
    """Calls of random tokens; padded are the first ones of row 1, by two, and, on both sides, of row 2."""
    generator = torch.Generator().manual_seed(0)
    total = sum(lengths)
    ids = torch.randint(3, model.config.vocab_size, (batch, total), generator=generator)
    mask = torch.ones(batch, total, dtype=torch.long)
    if padding == "left":
        mask[1, :2] = 0
        mask[2, :1] = 0
    elif padding == "right":
        mask[1, lengths[0] - 2 : lengths[0]] = 0
        mask[2, lengths[0] - 1 : lengths[0]] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    stops = torch.tensor(lengths).cumsum(0).tolist()
    return [
        Step(ids[:, stop - length : stop], mask[:, :stop], positions[:, stop - length : stop])
        for length, stop in zip(lengths, stops, strict=True)
    ]


@torch.no_grad()
def run_steps(gm: fx.GraphModule, model: PreTrainedModel, calls: Sequence[Step]) -> Iterator[tuple[torch.Tensor, ...]]:
    """What each call returns, on the cache that the one before it returned."""
    batch = len(calls[0].input_ids)
    shapes = [(heads, size) for heads, *sizes in _cache_shapes(model) for size in sizes]
    past = [torch.zeros(batch, heads, 0, size) for heads, size in shapes]
    for call in calls:
        outputs = gm(call.input_ids, call.attention_mask, call.position_ids, *past)
        past = list(outputs[1 : 1 + len(past)])
        yield outputs


def at_tokens(outputs: Sequence[torch.Tensor], call: Step, cached: int) -> list[torch.Tensor]:
    """Logits and gates or masks of tokens alone, behind `cached` keys and values, which are left out."""
    return [output[call.is_token] for output in (outputs[0], *outputs[1 + cached :])]
