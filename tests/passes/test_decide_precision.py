import pytest
import torch
from torch import nn

from modcompile.passes.decide_precision import DecideForSequences, DecideForTokens, PrecisionInputs

_BITS = (4, 8, 16)
_INF = float("inf")


class _Given(nn.Module):
    """Logits that are the first of the hidden channels: `[B, T, 3]`, or of the first token `[B, 1, 3]`."""

    def __init__(self, *, for_tokens: bool) -> None:
        super().__init__()
        self.for_tokens = for_tokens

    def forward(self, hidden: torch.Tensor, token_weights: torch.Tensor) -> torch.Tensor:
        return hidden[..., :3] if self.for_tokens else hidden[:, :1, :3]


class _Score(nn.Module):
    """The last channel."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden[..., 3:]


def _inputs(mask: list[list[int]], bias: list[float]) -> tuple[torch.Tensor, ...]:
    """What a decision takes behind the hidden state."""
    ids = torch.zeros(len(mask), len(mask[0]), dtype=torch.long)
    *shared, row, _ = PrecisionInputs()(ids, torch.tensor(mask), torch.tensor([bias, bias]))
    return *shared, row


def _for_sequences(
    logits: list[list[float]], mask: list[list[int]], bias: list[float]
) -> tuple[list[bool], torch.Tensor]:
    hidden = torch.tensor(logits).unsqueeze(1).repeat(1, len(mask[0]), 1)
    *chosen, bits = DecideForSequences(_Given(for_tokens=False), _BITS)(hidden, *_inputs(mask, bias))
    return [bool(value) for value in chosen], bits


@pytest.mark.parametrize(
    ("logits", "mask", "bias", "expected"),
    [
        pytest.param([[3, 2, 1]], [[1, 1]], [0, 0, 0], 0, id="the largest logit"),
        pytest.param([[3, 2, 1], [1, 2, 0]], [[1, 1], [0, 1]], [0, 0, 0], 1, id="the highest precision of any row"),
        pytest.param([[3, 2, 1], [0, 1, 2]], [[1, 1], [0, 0]], [0, 0, 0], 0, id="padding asks for nothing"),
        pytest.param([[3, 2, 1]], [[1, 1]], [0, 0, 5], 2, id="a bias shifts"),
        pytest.param([[3, 2, 1]], [[1, 1]], [0, _INF, 0], 1, id="a bias forces"),
    ],
)
def test_decides_for_sequences(
    logits: list[list[float]], mask: list[list[int]], bias: list[float], expected: int
) -> None:
    chosen, bits = _for_sequences([[float(value) for value in row] for row in logits], mask, bias)
    assert chosen == [index == expected for index in range(3)]
    assert bits.tolist() == [[_BITS[expected]] * 2] * len(logits)
    assert bits.dtype == torch.int64


_UP, _DOWN = 1.0, -1.0


@pytest.mark.parametrize(
    ("scores", "expected", "bits"),
    [
        ([_DOWN, _DOWN], 0, [0, 0]),
        ([_DOWN, _UP], 2, [0, 8]),
        ([_UP, _UP], 2, [8, 8]),
    ],
)
def test_a_sequence_is_skipped_where_no_token_is_open(scores: list[float], expected: int, bits: list[int]) -> None:
    hidden = torch.tensor([[[0.0, 1.0, 0.0, score] for score in scores]])
    decide = DecideForSequences(_Given(for_tokens=False), _BITS, _Score())
    *chosen, actual, is_open = decide(hidden, *_inputs([[1, 1]], [0.0] * 3), torch.zeros(1, 2, 1))
    assert [bool(value) for value in chosen] == [index == expected for index in range(4)]
    assert actual.tolist() == [bits]
    assert is_open.flatten().tolist() == [score > 0 for score in scores]


_MIXED = 3


@pytest.mark.parametrize(
    ("choices", "mask", "expected"),
    [
        pytest.param([[1, 1]], [[1, 1]], 1, id="all agree"),
        pytest.param([[1, 2]], [[1, 1]], _MIXED, id="two tokens differ"),
        pytest.param([[1, 1], [0, 0]], [[1, 1], [1, 1]], _MIXED, id="two rows differ"),
        pytest.param([[2, 1], [1, 1]], [[0, 1], [1, 1]], 1, id="padding has no say"),
    ],
)
def test_decides_for_tokens(choices: list[list[int]], mask: list[list[int]], expected: int) -> None:
    hidden = nn.functional.one_hot(torch.tensor(choices), 4).float()
    decide = DecideForTokens(_Given(for_tokens=True), _BITS)
    *chosen, bits, version = decide(hidden, *_inputs(mask, [0.0] * 3))
    assert [bool(value) for value in chosen] == [index == expected for index in range(4)]
    assert bits.tolist() == [[_BITS[choice] for choice in row] for row in choices]
    assert version.squeeze(-1).tolist() == choices


def test_a_closed_token_has_the_version_that_is_skipped() -> None:
    hidden = torch.tensor([[[0.0, 1.0, 0.0, _UP], [1.0, 0.0, 0.0, _DOWN]]])
    decide = DecideForTokens(_Given(for_tokens=True), _BITS, _Score())
    *chosen, bits, version = decide(hidden, *_inputs([[1, 1]], [0.0] * 3), torch.zeros(1, 2, 1))
    assert [bool(value) for value in chosen] == [False, False, False, False, True]
    assert bits.tolist() == [[8, 0]]
    assert version.flatten().tolist() == [2, 0]


def test_layers_share_the_masks_and_have_a_bias_each() -> None:
    ids, mask = torch.zeros(3, 2, dtype=torch.long), torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1], [1, 1, 0, 0]])
    bias = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    token_mask, token_weights, has_tokens, *biases = PrecisionInputs()(ids, mask, bias)
    assert token_mask.squeeze(-1).tolist() == [[True, False], [True, True], [False, False]]
    assert token_weights.squeeze(-1).tolist() == [[1, 0], [0.5, 0.5], [0, 0]]
    assert has_tokens.tolist() == [[1], [1], [0]]
    assert [row.tolist() for row in biases] == bias.tolist()
