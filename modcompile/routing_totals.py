"""What a line of training or evaluation metrics is made of."""

from collections.abc import Mapping, Sequence

import torch


class RoutingTotals:
    """Sums over batches, kept on the device: reading them at every step would wait for it."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._sums: torch.Tensor | None = None

    def add(
        self,
        summed_loss: torch.Tensor,
        predicted: torch.Tensor,
        tokens: torch.Tensor,
        summed: Mapping[str, torch.Tensor],
    ) -> None:
        """Add a batch, in scalars: the loss summed over `predicted` tokens, sums over all `tokens` by name."""
        values = [summed_loss, predicted, tokens, *(summed[name] for name in self._names)]
        added = torch.stack([value.detach().float() for value in values])
        self._sums = added if self._sums is None else self._sums + added

    def take(self) -> dict[str, float]:
        """The means over tokens since the last call, NaN without any: lm_loss, and those of the names."""
        sums = torch.full((3 + len(self._names),), torch.nan) if self._sums is None else self._sums
        self._sums = None
        summed_loss, predicted, tokens, *summed = sums.tolist()
        return {"lm_loss": summed_loss / predicted} | {
            name: value / tokens for name, value in zip(self._names, summed, strict=True)
        }
