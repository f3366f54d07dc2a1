"""The routers that weigh the precisions of a block, and how their logits become weights."""

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
        self.for_tokens = for_tokens
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

    def extra_repr(self) -> str:
        return f"for_tokens={self.for_tokens}"


class SoftMixer(nn.Module):
    """`router_logits [B, S, P]` → weights of the branches: their softmax; out of training, 1 for the largest."""

    def forward(self, router_logits: torch.Tensor) -> torch.Tensor:
        return torch.softmax(router_logits, -1) if self.training else _of_largest(router_logits)


class StraightThroughMixer(nn.Module):
    """`router_logits [B, S, P]` → 1 for the largest, with the gradient of the softmax.

    What is trained is then what will be computed.
    """

    def forward(self, router_logits: torch.Tensor) -> torch.Tensor:
        return straight_through(torch.softmax(router_logits, -1), _of_largest(router_logits))


def _of_largest(router_logits: torch.Tensor) -> torch.Tensor:
    return one_hot(router_logits.argmax(-1), router_logits.shape[-1]).to(router_logits.dtype)
