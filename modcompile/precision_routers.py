"""The routers that weigh the precisions of a block, and how their logits become weights."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.functional import linear, one_hot

from modcompile.precisions import PackedWeight
from modcompile.quantization import quantize
from modcompile.straight_through import straight_through

_WIDTH = 128
_NUM_BITS, _GROUP_SIZE = 8, 64
"""Of the wide weights of a router in use: at full precision it would read a fifth of what its block at 4 bits reads."""

_PREFERENCE = 0.5
"""Of logits: what training has to outweigh."""


class PrecisionRouter(nn.Module):
    """Hidden state `[B, T, H]` → `router_logits [B, S, P]`: Linear → ReLU → dropout → Linear → ReLU → dropout → Linear.

    For tokens (S = T) it reads each of them, for sequences (S = 1) the mean of their tokens: the sum by `token_weights
    [B, T, 1]`, which leave padding out. It starts without a preference but for a slight one for more bits. Out of
    training, the first two weights are rounded to 8 bits, as `packed` has them.
    """

    def __init__(self, hidden_size: int, num_precisions: int, *, dropout: float, for_tokens: bool = False) -> None:
        super().__init__()
        self.hidden_size, self.for_tokens = hidden_size, for_tokens
        self.first = RoundedLinear(hidden_size, _WIDTH)
        self.second = RoundedLinear(_WIDTH, _WIDTH)
        self.last = nn.Linear(_WIDTH, num_precisions)
        self.dropout = nn.Dropout(dropout)
        nn.init.zeros_(self.last.weight)
        with torch.no_grad():
            self.last.bias.copy_(torch.linspace(0, 1, num_precisions))

    def forward(self, hidden_state: torch.Tensor, token_weights: torch.Tensor) -> torch.Tensor:
        x = hidden_state if self.for_tokens else mean_of_tokens(hidden_state, token_weights)
        x = self.dropout(torch.relu(self.first(x)))
        x = self.dropout(torch.relu(self.second(x)))
        logits: torch.Tensor = self.last(x)
        return logits if self.for_tokens else logits.unsqueeze(1)

    @property
    def reads_input(self) -> bool:
        """Whether its choice depends on the input; not before it is trained."""
        return bool(self.last.weight.any())

    def prefer(self, precision: int) -> None:
        """Start anew with a slight preference for the precision at this position, whatever the input."""
        with torch.no_grad():
            self.last.weight.zero_()
            self.last.bias.zero_()
            self.last.bias[precision] = _PREFERENCE

    def like(self, num_precisions: int) -> "PrecisionRouter":
        """A new router of the same sizes for another number of precisions."""
        return PrecisionRouter(self.hidden_size, num_precisions, dropout=0.0, for_tokens=self.for_tokens)

    def take(self, other: "PrecisionRouter", precisions: Sequence[int]) -> None:
        """Copy a router's parameters; of its precisions, those at these positions."""
        state = other.state_dict()
        for name in ("last.weight", "last.bias"):
            state[name] = state[name][list(precisions)]
        self.load_state_dict(state)

    def extra_repr(self) -> str:
        return f"for_tokens={self.for_tokens}"


def mean_of_tokens(hidden_state: torch.Tensor, token_weights: torch.Tensor) -> torch.Tensor:
    """`[B, H]`; as a product, it is one operator in ONNX."""
    return torch.matmul(token_weights.to(hidden_state.dtype).transpose(1, 2), hidden_state).squeeze(1)


class RoundedLinear(nn.Linear):
    """A linear layer whose weight is rounded to 8 bits out of training; gradients pass the rounding."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self._rounded: tuple[tuple[int, int, torch.device], torch.Tensor] | None = None

    def train(self, mode: bool = True) -> "RoundedLinear":
        """Forget the rounded weight: some optimizers change weights without a trace."""
        self._rounded = None
        super().train(mode)
        return self

    def packed(self) -> PackedWeight:
        """The weight at 8 bits."""
        return PackedWeight.of(quantize(self.weight.detach().cpu(), _NUM_BITS, _GROUP_SIZE))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            return super().forward(x)
        weight = self.weight
        # Rounded again where it has changed since.
        key = (weight._version, weight.data_ptr(), weight.device)
        if self._rounded is None or self._rounded[0] != key:
            self._rounded = key, self.packed().dequantize(self.in_features).to(weight)
        return linear(x, straight_through(weight, self._rounded[1]), self.bias)


class PrecisionMixer(nn.Module):
    """`router_logits [B, S, P]` → weights of the branches.

    They are the softmax; `straight_through`, 1 for the largest with the gradient of the softmax, so that what is
    trained is what will be computed. While `hard`, they are what will be computed, in any case.
    """

    def __init__(self, *, straight_through: bool) -> None:
        super().__init__()
        self.straight_through, self.hard = straight_through, False

    def forward(self, router_logits: torch.Tensor) -> torch.Tensor:
        if self.hard:
            return _of_largest(router_logits)
        weights = torch.softmax(router_logits, -1)
        return straight_through(weights, _of_largest(router_logits)) if self.straight_through else weights


def _of_largest(router_logits: torch.Tensor) -> torch.Tensor:
    return one_hot(router_logits.argmax(-1), router_logits.shape[-1]).to(router_logits.dtype)
