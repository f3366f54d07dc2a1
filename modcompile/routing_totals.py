"""What a line of training or evaluation metrics is made of."""

from collections.abc import Callable, Mapping, Sequence

import torch


class RoutingTotals:
    """Sums over batches, kept on the device: reading them at every step would wait for it."""

    def __init__(self, losses: Sequence[str], names: Sequence[str]) -> None:
        """`losses` are means over predicted tokens, `names` over all."""
        self._losses, self._names = losses, names
        self._sums: dict[str, torch.Tensor] = {}

    def add(self, predicted: torch.Tensor, tokens: torch.Tensor, summed: Mapping[str, torch.Tensor]) -> None:
        """Add a batch: losses summed over `predicted` tokens, sums over all `tokens`, by name; scalars or vectors."""
        for name, value in {**summed, _PREDICTED: predicted, _TOKENS: tokens}.items():
            added = value.detach().float()
            self._sums[name] = self._sums[name] + added if name in self._sums else added

    def take(self, summed: Callable[[torch.Tensor], torch.Tensor] = torch.clone) -> dict[str, torch.Tensor]:
        """The means since the last call, by name; NaN without any batch.

        `summed` adds up a tensor over the processes that train together.
        """
        sums, self._sums = {name: summed(value) for name, value in self._sums.items()}, {}
        counts = dict.fromkeys(self._losses, _PREDICTED) | dict.fromkeys(self._names, _TOKENS)
        if not sums:
            return dict.fromkeys(counts, torch.tensor(torch.nan))
        return {name: (sums[name] / sums[count]).cpu() for name, count in counts.items()}


_PREDICTED, _TOKENS = "predicted tokens", "tokens"
