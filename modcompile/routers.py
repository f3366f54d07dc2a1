"""Routers and gates: the trainable part of a routed graph."""

import torch
from torch import nn

from modcompile.straight_through import straight_through


class DepthScore(nn.Module):
    """Hidden state `[B, T, H]` → score `[B, T, 1]`: LayerNorm → Linear → SiLU → dropout → Linear.

    On a small model what a router costs is its number of operators, so none is spent on a bias: that of the first
    linear is the norm's (there is one only where there is no norm), that of the last stands in the router.
    """

    def __init__(self, hidden_size: int, router_hidden_size: int, *, dropout: float, layer_norm: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size) if layer_norm else nn.Identity()
        self.up = nn.Linear(hidden_size, router_hidden_size, bias=not layer_norm)
        self.dropout = nn.Dropout(dropout)
        self.down = nn.Linear(router_hidden_size, 1, bias=False)

    def forward(self, hidden_state: torch.Tensor) -> torch.Tensor:
        hidden = self.dropout(nn.functional.silu(self.up(self.norm(hidden_state))))
        score: torch.Tensor = self.down(hidden)
        return score


class LinearScore(nn.Module):
    """Hidden state `[B, T, H]` → score `[B, T, 1]`: LayerNorm without weights → Linear."""

    def __init__(self, hidden_size: int, *, layer_norm: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size, elementwise_affine=False) if layer_norm else nn.Identity()
        self.down = nn.Linear(hidden_size, 1, bias=False)

    def forward(self, hidden_state: torch.Tensor) -> torch.Tensor:
        score: torch.Tensor = self.down(self.norm(hidden_state))
        return score


class DepthRouter(nn.Module):
    """Hidden state `[B, T, H]` → `router_logits [B, T, 1]`: `score(hidden) + bias`.

    The score starts at zero and the bias at `init_bias`: at the start every gate is `sigmoid(init_bias)`, open. They
    stand apart so that `harden_gates` can move the bias into the threshold. With a `router_hidden_size` of 0 the score
    is linear, and `dropout` has nothing to act on.
    """

    def __init__(
        self, hidden_size: int, router_hidden_size: int, *, dropout: float, layer_norm: bool, init_bias: float
    ) -> None:
        super().__init__()
        self.score = (
            DepthScore(hidden_size, router_hidden_size, dropout=dropout, layer_norm=layer_norm)
            if router_hidden_size
            else LinearScore(hidden_size, layer_norm=layer_norm)
        )
        self.bias = nn.Parameter(torch.full((1,), init_bias))
        nn.init.zeros_(self.score.down.weight)

    def forward(self, hidden_state: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.score(hidden_state) + self.bias
        return logits


class SoftGate(nn.Module):
    """`router_logits` → gate in (0, 1), what the original trains: `sigmoid(router_logits)`."""

    def forward(self, router_logits: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(router_logits)


class HardenedGate(nn.Module):
    """`router_logits` → what another gate makes of them; while `hard`, 0 or 1, as at a threshold of 0.5."""

    def __init__(self, gate: nn.Module) -> None:
        super().__init__()
        self.gate, self.hard = gate, False

    def forward(self, router_logits: torch.Tensor) -> torch.Tensor:
        if self.hard:
            return (router_logits > 0).to(router_logits.dtype)
        gate: torch.Tensor = self.gate(router_logits)
        return gate


class StraightThroughGate(nn.Module):
    """`router_logits` → gate in {0, 1}: `sigmoid(router_logits) > 0.5` forward, the sigmoid's gradient backward.

    What is trained is then what will be skipped at a threshold of 0.5.
    """

    def forward(self, router_logits: torch.Tensor) -> torch.Tensor:
        gate = torch.sigmoid(router_logits)
        if not gate.requires_grad:
            return (router_logits > 0).to(gate.dtype)
        return straight_through(gate, router_logits > 0)


class HardConcreteGate(nn.Module):
    """`router_logits` → gate in [0, 1]: the hard concrete distribution of Louizos et al., 2018, section 2.2.

    `clamp(stretched(sigmoid((logits + noise) / temperature)), 0, 1)`, where `stretched(s)` is `1.2 s - 0.1`, so that a
    part of the distribution is exactly 0 or 1. Noise, the logistic one, and temperature are of the training; evaluated,
    the gate is `clamp(stretched(sigmoid(logits)), 0, 1)`, above 0.5 where the sigmoid is.
    """

    temperature = 2 / 3
    low, high = -0.1, 1.1

    def forward(self, router_logits: torch.Tensor) -> torch.Tensor:
        logits = router_logits
        if self.training:
            noise = torch.logit(torch.rand_like(router_logits, dtype=torch.float32), eps=1e-6).to(router_logits)
            logits = (router_logits + noise) / self.temperature
        gate: torch.Tensor = (torch.sigmoid(logits) * (self.high - self.low) + self.low).clamp(0, 1)
        return gate
