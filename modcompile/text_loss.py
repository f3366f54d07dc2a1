"""The cross-entropy of a text that `tokenize_and_pack` has made blocks of; padding counts nowhere."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import cross_entropy

from modcompile.errors import DataError

if TYPE_CHECKING:  # it takes half a second to import
    from datasets import Dataset

_IGNORED = -100  # as in the labels of `tokenize_and_pack`


@dataclass(frozen=True)
class TextLoss:
    """What a model loses on a text."""

    loss: float
    """Mean cross-entropy of a predicted token, in nats; the first token of a sequence is not predicted."""

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that is no floating-point number."""
        try:
            return math.exp(self.loss)
        except OverflowError:
            return math.inf


def count_predicted_tokens(blocks: "Dataset", vocab_size: int) -> int:
    """How many tokens a model of `vocab_size` tokens has to predict.

    Raises:
        DataError: there is none, or one that the model does not have.
    """
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


def batches(blocks: "Dataset", batch_size: int, device: torch.device) -> Iterator[dict[str, torch.Tensor]]:
    """The columns of `blocks`, `[B, T]`, without the positions that are padding in all B sequences."""
    for batch in blocks.with_format("torch").iter(batch_size):
        width = int(batch["attention_mask"].sum(1).max())  # padding is on the right
        yield {name: tensor[:, :width].to(device) for name, tensor in batch.items()}


def summed_loss(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """The cross-entropy of all predicted tokens, from `logits [B, T, V]` and `labels [B, T]`, in nats."""
    total = 0.0
    # Row by row: cross-entropy copies the logits, which for a batch can take more memory than the model.
    for row, wanted in zip(logits[:, :-1], labels[:, 1:], strict=True):
        losses = cross_entropy(row.float(), wanted, ignore_index=_IGNORED, reduction="none")
        total += float(losses.double().sum())
    return total
