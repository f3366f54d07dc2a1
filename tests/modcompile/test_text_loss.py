import math

import pytest
import torch
from datasets import Dataset

from modcompile.errors import DataError
from modcompile.text_loss import TextLoss, batches, count_predicted_tokens, summed_loss


def _blocks(*lengths: int) -> Dataset:
    """Sequences of these lengths, in places for six tokens."""
    return Dataset.from_list(
        [
            {
                "input_ids": [*range(1, length + 1), *[0] * (6 - length)],
                "attention_mask": [int(place < length) for place in range(6)],
                "labels": [*range(1, length + 1), *[-100] * (6 - length)],
            }
            for length in lengths
        ]
    )


def test_perplexity_is_the_exponential_of_the_loss() -> None:
    assert TextLoss(math.log(7)).perplexity == pytest.approx(7)
    assert TextLoss(1e6).perplexity == math.inf


def test_counts_all_tokens_but_the_first_and_padding() -> None:
    assert count_predicted_tokens(_blocks(6, 3, 1), vocab_size=7) == 5 + 2


def test_refuses_what_can_not_be_predicted() -> None:
    with pytest.raises(DataError, match="the token 6, but the model has 6"):
        count_predicted_tokens(_blocks(6), vocab_size=6)
    with pytest.raises(DataError, match="fewer than two tokens"):
        count_predicted_tokens(_blocks(1, 1), vocab_size=6)


def test_batches_are_as_wide_as_their_longest_sequence() -> None:
    found = list(batches(_blocks(2, 4, 3), 2, torch.device("cpu")))
    assert [batch["input_ids"].tolist() for batch in found] == [[[1, 2, 0, 0], [1, 2, 3, 4]], [[1, 2, 3]]]
    assert [batch["labels"].tolist() for batch in found] == [[[1, 2, -100, -100], [1, 2, 3, 4]], [[1, 2, 3]]]
    assert [batch["attention_mask"].tolist() for batch in found] == [[[1, 1, 0, 0], [1, 1, 1, 1]], [[1, 1, 1]]]


def test_sums_over_predicted_tokens_alone() -> None:
    logits = torch.randn(2, 4, 9, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[3, 1, 4, 1], [5, 8, -100, -100]])
    chances = logits.double().softmax(-1)
    predicted = [(0, 0, 1), (0, 1, 4), (0, 2, 1), (1, 0, 8)]
    expected = -sum(math.log(float(chances[row, place, token])) for row, place, token in predicted)
    assert summed_loss(logits, labels) == pytest.approx(expected, rel=1e-6)
