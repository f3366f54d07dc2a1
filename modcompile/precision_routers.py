"""The routers that weigh the precisions of a block, and how their logits become weights."""

import torch
from torch import nn

_WIDTH = 128


class PrecisionRouter(nn.Module):
    """Hidden state `[B, T, H]` and token mask `[B, T, 1]` → `router_logits [B, P]`.

    The mean of the tokens (padding excluded) → Linear → ReLU → dropout → Linear → ReLU → dropout →
    Linear. It starts without a preference but for a slight one for more bits.
    """

    def __init__(self, hidden_size: int, num_precisions: int, *, dropout: float) -> None:
        super().__init__()
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

    def forward(self, hidden_state: torch.Tensor, token_mask: torch.Tensor) -> torch.Tensor:
        mask = token_mask.to(hidden_state.dtype)
        mean = (hidden_state * mask).sum(1) / mask.sum(1).clamp(min=1)
        logits: torch.Tensor = self.layers(mean)
        return logits


class SoftMixer(nn.Module):
    """`router_logits [B, P]` → weights of the branches, their softmax, `[B, 1, P]`."""

    def forward(self, router_logits: torch.Tensor) -> torch.Tensor:
        return torch.softmax(router_logits, -1).unsqueeze(1)
