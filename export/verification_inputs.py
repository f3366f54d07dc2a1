"""What an exported artifact is tried on: texts, paddings, and thresholds that show every `If` from both sides."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from transformers import PretrainedConfig

from modcompile.export.module_outputs import module_outputs
from modcompile.modeling import RoutedForCausalLM

NUM_DECODE_STEPS = 16
_PREFILL_LENGTHS = (1, 2, 5, 9, 16, 27, 41, 64)
NUM_TEXTS = len(_PREFILL_LENGTHS)
_MIN_GAP = 1e-3
_LEAST = 1e-30  # a threshold that every gate is above, and padding is not


@dataclass(frozen=True)
class Case:
    """Rows of token ids that go through a prefill and then, token by token, through decode steps.

    Rows of unequal length are padded in the prefill, on the given side; the decode tokens `[rows, NUM_DECODE_STEPS]`
    are what follows in the text, so that PyTorch and ONNX Runtime see the same.
    """

    name: str
    thresholds: tuple[float, ...]
    prefills: tuple[tuple[int, ...], ...]
    decodes: tuple[tuple[int, ...], ...]
    padding: Literal["left", "right"] = "left"
    precision_bias: tuple[tuple[float, ...], ...] = ()
    """A row for each layer that chooses a precision."""

    def prefill_arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """input_ids `[B, T]`, attention_mask `[B, T]`."""
        width = max(map(len, self.prefills))
        ids = np.zeros((len(self.prefills), width), np.int64)
        mask = np.zeros_like(ids)
        for row, tokens in enumerate(self.prefills):
            columns = slice(width - len(tokens), width) if self.padding == "left" else slice(0, len(tokens))
            ids[row, columns], mask[row, columns] = tokens, 1
        return ids, mask


def verification_cases(
    model: RoutedForCausalLM, texts: Sequence[Sequence[int]], thresholds: Sequence[float]
) -> list[Case]:
    """The artifact's own thresholds on each of 8 rows alone, and other thresholds on all rows as a padded batch.

    `texts` are 8 rows of token ids; short ones are repeated, so that each has enough for its prefill and the decode
    steps.
    """
    prefills, decodes = split_texts(model.config, texts)
    count = len(model.gated_layers)
    cases = [
        Case("own thresholds, row by row", tuple(thresholds), (prefill,), (decode,))
        for prefill, decode in zip(prefills, decodes, strict=True)
    ]
    others: list[tuple[str, Sequence[float], Literal["left", "right"]]] = [
        ("own thresholds, batch", thresholds, "left"),
        ("all executed", [0.0] * count, "right"),
        ("all but padding executed", [_LEAST] * count, "left"),
        ("all skipped", [2.0] * count, "left"),
        ("every other one", [(0.0, 2.0)[index % 2] for index in range(count)], "right"),
        ("half of the tokens", _halving_thresholds(model, prefills), "left"),
    ]
    return cases + [Case(name, tuple(values), prefills, decodes, side) for name, values, side in others]


def split_texts(
    config: PretrainedConfig, texts: Sequence[Sequence[int]]
) -> tuple[tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...]]:
    """The prefills, of mixed lengths within the positions of a model, and the decode tokens of 8 rows of token ids."""
    longest = getattr(config, "max_position_embeddings", None) or max(_PREFILL_LENGTHS) + NUM_DECODE_STEPS
    lengths = [min(length, max(1, longest - NUM_DECODE_STEPS)) for length in _PREFILL_LENGTHS]
    steps = min(NUM_DECODE_STEPS, longest - 1)
    rows = [_fill(text, length + steps) for text, length in zip(texts, lengths, strict=True)]
    prefills = tuple(row[:length] for row, length in zip(rows, lengths, strict=True))
    return prefills, tuple(row[length:] for row, length in zip(rows, lengths, strict=True))


def _fill(tokens: Sequence[int], length: int) -> tuple[int, ...]:
    repeated = list(tokens) * (length // len(tokens) + 1)
    return tuple(repeated[:length])


def _halving_thresholds(model: RoutedForCausalLM, prefills: Sequence[Sequence[int]]) -> list[float]:
    """For each gate a threshold that splits the tokens about in half."""
    before = model.hard_thresholds
    model.set_router_mode(None)
    with module_outputs(model.routers) as logits, torch.no_grad():
        for prefill in prefills:
            model(torch.tensor([prefill], device=model.device))
    model.set_router_mode(before)
    return [splitting_threshold(torch.cat([each.flatten() for each in of_gate])) for of_gate in logits.values()]


def splitting_threshold(router_logits: torch.Tensor) -> float:
    """What splits the gates of logits `[N]` about in half: a threshold in their widest gap near the median.

    In a gap, so that a rounding error does not decide a route. Where gates near the median are all but equal (a router
    that was never trained says the same of every token), the widest gap anywhere must do, and may split nothing.
    """
    values = router_logits.sigmoid().sort().values
    low, high = int(0.3 * len(values)), max(int(0.7 * len(values)), int(0.3 * len(values)) + 1)
    middle = values[low : high + 1]
    if middle.diff().max() < _MIN_GAP:
        middle = torch.cat([torch.zeros(1), values, torch.ones(1)])
    gap = int(middle.diff().argmax())
    return float((middle[gap] + middle[gap + 1]) / 2)
