"""The routers that weigh the precisions of a block, and how their logits become weights."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.functional import one_hot

from modcompile.straight_through import straight_through

_WIDTH = 128


class PrecisionRouter(nn.Module):
    """Hidden state `[B, T, H]` → `router_logits [B, S, P]`: Linear → ReLU → dropout → Linear → ReLU → dropout → Linear.

    For tokens (S = T) it reads each of them, for sequences (S = 1) the mean of their tokens: the sum by `token_weights
    [B, T, 1]`, which leave padding out. It starts without a preference but for a slight one for more bits.
    """

    def __init__(self, hidden_size: int, num_precisions: int, *, dropout: float, for_tokens: bool = False) -> None:
        super().__init__()
        self.hidden_size, self.for_tokens = hidden_size, for_tokens
        self.layers = nn.Sequential(
            nn.Linear(hidden_size, _WIDTH),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(_WIDTH, _WIDTH),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(_WIDTH, num_precisions),
        )
        last = self.layers[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        with torch.no_grad():
            last.bias.copy_(torch.linspace(0, 1, num_precisions))

    def forward(self, hidden_state: torch.Tensor, token_weights: torch.Tensor) -> torch.Tensor:
        if self.for_tokens:
            logits: torch.Tensor = self.layers(hidden_state)
            return logits
        mean = (hidden_state * token_weights.to(hidden_state.dtype)).sum(1)
        # As a matrix: with its bias, a product of two is one operator in ONNX.
        of_rows: torch.Tensor = self.layers(mean)
        return of_rows.unsqueeze(1)

    def like(self, num_precisions: int) -> "PrecisionRouter":
        """A new router of the same sizes for another number of precisions."""
        return PrecisionRouter(self.hidden_size, num_precisions, dropout=0.0, for_tokens=self.for_tokens)

    def take(self, other: "PrecisionRouter", precisions: Sequence[int]) -> None:
        """Copy a router's parameters; of its precisions, those at these positions."""
        state = other.state_dict()
        last = len(self.layers) - 1
        for name in (f"layers.{last}.weight", f"layers.{last}.bias"):
            state[name] = state[name][list(precisions)]
        self.load_state_dict(state)

    def extra_repr(self) -> str:
        return f"for_tokens={self.for_tokens}"


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
