"""Routers and gates that do as they are told."""

import torch
from torch import nn


class ForcedRouter(nn.Module):
    """`router_logits` that open the layer for exactly the tokens of a mask `[B, T, 1]`, at any threshold in (0, 1)."""

    def __init__(self, is_open: torch.Tensor) -> None:
        super().__init__()
        self.is_open = is_open

    def forward(self, hidden_state: torch.Tensor) -> torch.Tensor:
        return torch.where(self.is_open, 1e4, -1e4)


class ConstantGate(nn.Module):
    """One gate for every token, whatever the router says."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, router_logits: torch.Tensor) -> torch.Tensor:
        return torch.full_like(router_logits, self.value)
