"""What a routed model scores on a text, and how much of it that takes: dense, soft and hard."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from tqdm import tqdm

from modcompile.config import check
from modcompile.modeling import RoutedForCausalLM
from modcompile.restored_routing import restored_routing
from modcompile.text_loss import TextLoss, batches, count_predicted_tokens, summed_loss
from modcompile.tracing import eval_mode, find_layers


@dataclass(frozen=True)
class Measurement(TextLoss):
    """One mode of the model on a text; padding counts nowhere."""

    active_ratio: float
    """Share of (token, routed layer) pairs that were executed, by their work; where gates are soft, their mean."""
    block_work: float
    """Share of the work of all blocks that was done, those without a gate included."""
    active_ratio_per_layer: dict[int, float]
    """The same for each routed layer, by its index in the model."""


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
    predicted = count_predicted_tokens(blocks, model.config.vocab_size)
    threshold = tuple(hard_threshold) if isinstance(hard_threshold, Sequence) else hard_threshold
    modes = {"dense": 0.0, "soft": None, "hard": threshold}
    measured: dict[str, Measurement] = {}
    with (
        restored_routing(model),
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


def measure(
    model: RoutedForCausalLM,
    blocks: Dataset,
    hard_threshold: float | Sequence[float] | None,
    *,
    batch_size: int = 4,
) -> Measurement:
    """One mode of `model` on `blocks`, soft with None; its router mode and usage stay as they were.

    Raises:
        ConfigError: a threshold is negative, infinite or not a number.
        DataError: there is no token to predict, or one that the model does not have.
    """
    predicted = count_predicted_tokens(blocks, model.config.vocab_size)
    with restored_routing(model), eval_mode(model):
        model.set_router_mode(hard_threshold)
        return _measure(model, blocks, batch_size, predicted)


@torch.no_grad()
def _measure(
    model: RoutedForCausalLM, blocks: Dataset, batch_size: int, predicted: int, bar: "tqdm[Any] | None" = None
) -> Measurement:
    model.reset_usage()
    loss = 0.0
    for batch in batches(blocks, batch_size, model.device):
        output = model(batch["input_ids"], batch["attention_mask"], use_cache=False)
        loss += summed_loss(output.logits, batch["labels"])
        if bar is not None:
            bar.update(len(batch["labels"]))
    return Measurement(loss / predicted, model.active_ratio, _block_work(model), model.active_ratio_per_layer)


def _block_work(model: RoutedForCausalLM) -> float:
    skipped = sum(model.work[layer] * (1 - ratio) for layer, ratio in model.active_ratio_per_layer.items())
    return 1 - skipped / len(find_layers(model.base))
