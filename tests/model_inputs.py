"""Inputs of a causal LM with its cache, as transformers takes them and as a traced graph does."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from transformers import PreTrainedModel

from modcompile.tracing import CacheTensors, cache_shapes, from_cache, to_cache

Padding = Literal["none", "left", "right"]


@dataclass(frozen=True)
class ModelInputs:
    """B sequences of T new tokens behind P cached ones."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor
    past: CacheTensors

    @property
    def flat(self) -> tuple[torch.Tensor, ...]:
        """The arguments of a graph traced with a cache."""
        return (*self.tokens, *(tensor for pair in self.past for tensor in pair))

    @property
    def tokens(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The arguments of a graph traced without one."""
        return self.input_ids, self.attention_mask, self.position_ids

    @property
    def is_token(self) -> torch.Tensor:
        """`[B, T]`: which of the new tokens are not padding."""
        return self.attention_mask[:, -self.input_ids.shape[1] :].bool()

    def at_tokens(self, outputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Logits, keys, values and gates of a graph without those of padding, `[number of tokens, …]` each."""
        attended = self.attention_mask.bool()
        return [output.transpose(1, 2)[attended] if output.dim() == 4 else output[self.is_token] for output in outputs]

    def row(self, index: int) -> "ModelInputs":
        """One sequence alone, its padding kept."""
        rows = slice(index, index + 1)
        past = [(keys[rows], values[rows]) for keys, values in self.past]
        return ModelInputs(self.input_ids[rows], self.attention_mask[rows], self.position_ids[rows], past)

    def without_padding(self) -> "ModelInputs":
        """The same tokens of one sequence (B = 1, P = 0) without any padding."""
        input_ids, attention_mask, position_ids = (tensor[self.is_token].unsqueeze(0) for tensor in self.tokens)
        return ModelInputs(input_ids, attention_mask, position_ids, self.past)

    def with_other_rows(self, index: int, seed: int) -> "ModelInputs":
        """Other tokens, and another cache, in all rows but one."""
        generator = torch.Generator().manual_seed(seed)
        keep = torch.arange(len(self.input_ids)) == index

        def changed(tensor: torch.Tensor) -> torch.Tensor:
            other = torch.randn(tensor.shape, generator=generator)
            return torch.where(keep.view(-1, 1, 1, 1), tensor, other)

        input_ids = torch.where(keep.unsqueeze(1), self.input_ids, self._other_ids(generator))
        return replace(self, input_ids=input_ids, past=[(changed(keys), changed(values)) for keys, values in self.past])

    def with_other_padding(self, seed: int) -> "ModelInputs":
        """Other ids where the mask says padding."""
        generator = torch.Generator().manual_seed(seed)
        return replace(self, input_ids=torch.where(self.is_token, self.input_ids, self._other_ids(generator)))

    def _other_ids(self, generator: torch.Generator) -> torch.Tensor:
        return torch.randint(int(self.input_ids.max()) + 1, self.input_ids.shape, generator=generator)

    def step(self, start: int, stop: int, past: CacheTensors) -> "ModelInputs":
        """The new tokens from `start` to `stop`, behind `past`, which holds those before them."""
        hidden_tokens = self.attention_mask.shape[1] - self.input_ids.shape[1]
        return replace(
            self,
            input_ids=self.input_ids[:, start:stop],
            attention_mask=self.attention_mask[:, : hidden_tokens + stop],
            position_ids=self.position_ids[:, start:stop],
            past=past,
        )


def make_inputs(
    model: PreTrainedModel, batch: int, length: int, past_length: int, padding: Padding = "none", seed: int = 0
) -> ModelInputs:
    """Random tokens behind a random cache; row i has i + 1 padded positions, and every row one token or more."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(model.config.vocab_size, (batch, length), generator=generator)
    attention_mask = torch.ones(batch, past_length + length, dtype=torch.long)
    for row in range(batch):
        if padding == "left":
            attention_mask[row, : min(row + 1, past_length + length - 1)] = 0
        elif padding == "right":
            attention_mask[row, max(past_length + 1, past_length + length - row - 1) :] = 0
    position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, past_length:]

    def past(heads: int, size: int) -> torch.Tensor:
        return torch.randn(batch, heads, past_length, size, generator=generator)

    cache = [(past(heads, key), past(heads, value)) for heads, key, value in cache_shapes(model)]
    return ModelInputs(input_ids, attention_mask, position_ids, cache)


@torch.no_grad()
def run_model(model: PreTrainedModel, inputs: ModelInputs, *, use_cache: bool = True) -> tuple[torch.Tensor, ...]:
    """What a traced graph returns, computed by transformers: the logits, and the present keys and values."""
    output = model(
        input_ids=inputs.input_ids,
        attention_mask=inputs.attention_mask,
        position_ids=inputs.position_ids,
        past_key_values=to_cache(inputs.past) if use_cache else None,
        use_cache=use_cache,
    )
    presents = from_cache(output.past_key_values) if use_cache else []
    return output.logits, *(tensor for pair in presents for tensor in pair)


def kernel_atol(model: PreTrainedModel, length: int) -> float:
    """0, except where transformers itself runs one token with grouped heads through another kernel than several."""
    heads = model.config.num_attention_heads
    grouped = getattr(model.config, "num_key_value_heads", heads) != heads
    return 1e-5 if grouped and length == 1 else 0.0
