"""What a token goes through in the place of a block that it skips: a few trainable parameters."""

import torch
from torch import nn

from modcompile.config import SkipAdapterKind


class ScaleAdapter(nn.Module):
    """Hidden state `[B, T, H]` → `hidden * scale + shift`, each with H numbers; at the start the identity."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(hidden_size))
        self.shift = nn.Parameter(torch.zeros(hidden_size))

    def forward(self, hidden_state: torch.Tensor) -> torch.Tensor:
        return hidden_state * self.scale + self.shift

    def extra_repr(self) -> str:
        return f"{len(self.scale)}"


class LowRankAdapter(nn.Module):
    """Hidden state `[B, T, H]` → `hidden + up(down(hidden))`, through `rank` numbers; at the start the identity.

    No norm stands before it: what comes out is as large as what goes in, whatever the scale of the hidden state.
    """

    def __init__(self, hidden_size: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(hidden_size, rank, bias=False)
        self.up = nn.Linear(rank, hidden_size, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, hidden_state: torch.Tensor) -> torch.Tensor:
        change: torch.Tensor = self.up(self.down(hidden_state))
        return hidden_state + change

    @property
    def is_new(self) -> bool:
        """Whether it is still the identity that it was made as."""
        return not self.up.weight.any()


def make_adapter(kind: SkipAdapterKind, hidden_size: int, rank: int) -> nn.Module | None:
    """A new adapter; none of the kind `none`."""
    if kind == "scale":
        return ScaleAdapter(hidden_size)
    return LowRankAdapter(hidden_size, rank) if kind == "low_rank" else None
