"""A quantile of values that count differently."""

import torch


def weighted_quantile(values: torch.Tensor, weights: torch.Tensor, share: float) -> torch.Tensor:
    """The largest value such that what lies at or below it weighs `share` of the whole, infinite at the ends.

    `values` and `weights` are `[N]`. It lies halfway between two of the values.
    """
    ordered, order = values.sort()
    reached = weights[order].cumsum(0) / weights.sum()
    count = int((reached <= share + 1e-9).sum())
    if count == 0:
        return torch.tensor(-torch.inf, dtype=values.dtype)
    if count == len(values):
        return torch.tensor(torch.inf, dtype=values.dtype)
    return (ordered[count - 1] + ordered[count]) / 2
