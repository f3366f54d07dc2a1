"""What a line of training or evaluation metrics is made of."""

import math

import torch


class RoutingTotals:
    """Sums over batches, kept on the device: reading them at every step would wait for it."""

    def __init__(self) -> None:
        self._sums: torch.Tensor | None = None

    def add(
        self,
        summed_loss: torch.Tensor,
        predicted: torch.Tensor,
        active: torch.Tensor,
        budget_loss: torch.Tensor,
        tokens: torch.Tensor,
    ) -> None:
        """Add a batch, in scalars: the loss summed over its `predicted` tokens, two sums over all its `tokens`."""
        added = torch.stack([summed_loss, predicted, active, budget_loss, tokens]).detach()
        self._sums = added if self._sums is None else self._sums + added

    def take(self) -> dict[str, float]:
        """The means over tokens since the last call, NaN without any: lm_loss, active_ratio, budget_loss."""
        sums = [math.nan] * 5 if self._sums is None else self._sums.tolist()
        self._sums = None
        summed_loss, predicted, active, budget_loss, tokens = sums
        return {
            "lm_loss": summed_loss / predicted,
            "active_ratio": active / tokens,
            "budget_loss": budget_loss / tokens,
        }
