"""Routers and gates that do as they are told."""

from collections.abc import Mapping

import torch
from torch import fx, nn


class ForcedRouter(nn.Module):
    """`router_logits` that open the layer for exactly the tokens of a mask `[B, T, 1]`, at any threshold in (0, 1)."""

    is_open: torch.Tensor

    def forward(self, hidden_state: torch.Tensor) -> torch.Tensor:
        return torch.where(self.is_open, 1e4, -1e4)


def force(gm: fx.GraphModule, is_open: Mapping[int, torch.Tensor]) -> None:
    """Give each forced router of a hard or lowered graph the mask of its layer."""
    for layer, mask in is_open.items():
        router = gm.get_submodule(f"blocks.{layer}.decide.score")
        assert isinstance(router, ForcedRouter)
        router.is_open = mask


class ConstantGate(nn.Module):
    """One gate for every token, whatever the router says."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, router_logits: torch.Tensor) -> torch.Tensor:
        return torch.full_like(router_logits, self.value)
