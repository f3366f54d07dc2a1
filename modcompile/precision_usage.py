"""With how many bits a model of several precisions computed its tokens."""

from collections.abc import Mapping, Sequence

import torch

from modcompile.precision_config import PRECISIONS

_MOST_BITS = max(PRECISIONS)


class PrecisionUsage:
    """Counts tokens that are not padding, for each block by the bits that it had for them, 0 where it was skipped.

    The counts stay on the device until they are asked for: reading them at every step would wait for it.
    """

    def __init__(self) -> None:
        self._counts: torch.Tensor | None = None  # [blocks, bits]

    def update(self, num_bits: Sequence[torch.Tensor], tokens: torch.Tensor) -> None:
        """Add a call: the bits `[B, T]`, integers, of every block, and the tokens' mask `[B, T]`."""
        counted = torch.arange(_MOST_BITS + 1, device=tokens.device)
        found = torch.stack(list(num_bits)).unsqueeze(-1) == counted
        added = (found & (tokens != 0).unsqueeze(-1)).sum((1, 2))
        self._counts = added if self._counts is None else self._counts + added

    @property
    def shares(self) -> tuple[dict[int, float], ...]:
        """For each block the share of tokens by their bits, the fewest first; bits that no token had are left out.

        Empty before the first call.
        """
        if self._counts is None:
            return ()
        return tuple(
            {bits: count / sum(counts) for bits, count in enumerate(counts) if count}
            for counts in self._counts.tolist()
        )

    @property
    def average_bits(self) -> float:
        """The mean over tokens and blocks; NaN before the first call."""
        averages = [mean_bits(shares) for shares in self.shares]
        return sum(averages) / len(averages) if averages else float("nan")


def mean_bits(shares: Mapping[int, float]) -> float:
    """The mean over tokens, from the shares of tokens by their bits."""
    return sum(bits * share for bits, share in shares.items())
