"""What a line of training or evaluation metrics is made of."""

from collections.abc import Mapping, Sequence

import torch


class RoutingTotals:
    """Sums over batches, kept on the device: reading them at every step would wait for it."""

    def __init__(self, losses: Sequence[str], names: Sequence[str]) -> None:
        """`losses` are means over predicted tokens, `names` over all."""
        self._losses, self._names = losses, names
        self._sums: torch.Tensor | None = None

    def add(
        self,
        predicted: torch.Tensor,
        tokens: torch.Tensor,
        summed: Mapping[str, torch.Tensor],
    ) -> None:
        """Add a batch, in scalars: losses summed over `predicted` tokens, and sums over all `tokens`, by name."""
        values = [predicted, tokens, *(summed[name] for name in (*self._losses, *self._names))]
        added = torch.stack([value.detach().float() for value in values])
        self._sums = added if self._sums is None else self._sums + added

    def take(self) -> dict[str, float]:
        """The means since the last call, by name; NaN without any batch."""
        names = (*self._losses, *self._names)
        sums = torch.full((2 + len(names),), torch.nan) if self._sums is None else self._sums
        self._sums = None
        predicted, tokens, *summed = sums.tolist()
        counts = [predicted] * len(self._losses) + [tokens] * len(self._names)
        return {name: value / count for name, value, count in zip(names, summed, counts, strict=True)}
