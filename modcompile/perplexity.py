"""What a routed model scores on a text, and how much of it that takes: dense, soft and hard."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from modcompile.config import check
from modcompile.errors import DataError
from modcompile.modeling import RoutedForCausalLM
from modcompile.tracing import eval_mode

_IGNORED = -100  # as in the labels of `tokenize_and_pack`


@dataclass(frozen=True)
class Measurement:
    """One mode of the model on a text; padding counts nowhere."""

    loss: float
    """Mean cross-entropy of a predicted token, in nats; the first token of a sequence is not predicted."""
    active_ratio: float
    """Share of (token, routed layer) pairs that were executed; where gates are soft, their mean."""
    active_ratio_per_layer: dict[int, float]
    """The same for each routed layer, by its index in the model."""

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that is no floating-point number."""
        try:
            return math.exp(self.loss)
        except OverflowError:
            return math.inf


@dataclass(frozen=True)
class Evaluation:
    """A routed model on a text, in three modes of the same graph."""

    dense: Measurement
    """Every gate open, which is exactly the base model."""
    soft: Measurement
    """As it is trained: blocks mixed by their gates (straight-through gates are 0 or 1, so this is hard at 0.5)."""
    hard: Measurement
    """At the threshold: a block runs for the tokens whose gate is above it."""
    hard_threshold: float | tuple[float, ...]
    sequences: int
    predicted_tokens: int

    @property
    def modes(self) -> dict[str, Measurement]:
        """The three measurements, by name."""
        return {"dense": self.dense, "soft": self.soft, "hard": self.hard}


def evaluate_model(
    model: RoutedForCausalLM, blocks: Dataset, *, hard_threshold: float | Sequence[float] = 0.5, batch_size: int = 4
) -> Evaluation:
    """Measure `model` on `blocks` as `tokenize_and_pack` makes them; its router mode and usage stay as they were.

    Raises:
        ConfigError: a threshold is negative, infinite or not a number, or `batch_size` is below 1.
        DataError: there is no token to predict, or one that the model does not have.
    """
    check("batch_size", batch_size, at_least=1)
    predicted = _count_predicted_tokens(blocks, model.config.vocab_size)
    threshold = tuple(hard_threshold) if isinstance(hard_threshold, Sequence) else hard_threshold
    modes = {"dense": 0.0, "soft": None, "hard": threshold}
    measured: dict[str, Measurement] = {}
    with (
        _restored(model),
        eval_mode(model),
        tqdm(total=len(modes) * blocks.num_rows, unit="sequence", delay=2, leave=False) as bar,
    ):
        for mode in modes.values():
            model.set_router_mode(mode)  # a threshold that is none is refused before minutes of work
        for name, mode in modes.items():
            bar.set_description(f"Evaluating {name}")
            model.set_router_mode(mode)
            measured[name] = _measure(model, blocks, batch_size, predicted, bar)
    return Evaluation(**measured, hard_threshold=threshold, sequences=blocks.num_rows, predicted_tokens=predicted)


@torch.no_grad()
def _measure(
    model: RoutedForCausalLM, blocks: Dataset, batch_size: int, predicted: int, bar: "tqdm[Any]"
) -> Measurement:
    model.reset_usage()
    loss = 0.0
    for batch in blocks.with_format("torch").iter(batch_size):
        width = int(batch["attention_mask"].sum(1).max())  # padding is on the right
        tensors = {name: tensor[:, :width].to(model.device) for name, tensor in batch.items()}
        output = model(tensors["input_ids"], tensors["attention_mask"], use_cache=False)
        # Row by row: cross-entropy copies the logits, which for a batch can take more memory than the model.
        for logits, labels in zip(output.logits[:, :-1], tensors["labels"][:, 1:], strict=True):
            losses = cross_entropy(logits.float(), labels, ignore_index=_IGNORED, reduction="none")
            loss += float(losses.double().sum())
        bar.update(len(tensors["labels"]))
    return Measurement(loss / predicted, model.active_ratio, model.active_ratio_per_layer)


def _count_predicted_tokens(blocks: Dataset, vocab_size: int) -> int:
    count = 0
    for batch in blocks.with_format("numpy").iter(1024):
        largest = int(batch["input_ids"].max())
        if largest >= vocab_size:
            raise DataError(
                f"the text has the token {largest}, but the model has {vocab_size}: it was tokenized for another model"
            )
        count += int((batch["labels"][:, 1:] != _IGNORED).sum())
    if not count:
        raise DataError("the text has fewer than two tokens, so there is none to predict: give more text")
    return count


@contextmanager
def _restored(model: RoutedForCausalLM) -> Iterator[None]:
    threshold, usage = model.hard_thresholds, model.usage
    try:
        yield
    finally:
        model.set_router_mode(threshold)
        model.usage = usage
