"""One module for several routers' scores of the same hidden state, for inference.

    score_0(hidden), score_1(hidden)   →   joined(hidden): [B, T, 1] each → [B, T, 2]

Linear scores, with the same norm or none, are one product whose weight has a row for each. Those with a hidden layer
are two: the first has all hidden layers beside each other, each with its own norm's weight and bias worked into it; in
the second, a row is zero but for the columns of its own hidden layer. On a token that takes as many operators as one
router does.
"""

from collections.abc import Sequence

import torch
from torch import nn

from modcompile.routers import DepthScore, LinearScore


@torch.no_grad()
def join_scores(scores: Sequence[nn.Module]) -> nn.Module | None:
    """A module that maps a hidden state `[B, T, H]` to all `scores`, `[B, T, N]`, with weights of its own.

    None where they are neither all `LinearScore` nor all `DepthScore`, or where their norms are not of a kind.
    """
    linear = [score for score in scores if isinstance(score, LinearScore)]
    deep = [score for score in scores if isinstance(score, DepthScore)]
    norms = [*(score.norm for score in linear), *(score.norm for score in deep)]
    if len(scores) not in (len(linear), len(deep)) or len({repr(norm) for norm in norms}) != 1:
        return None
    norm = _without_weights(norms[0])
    if linear:
        return nn.Sequential(norm, _product(torch.cat([score.down.weight for score in linear])))
    first = [_with_norm(score) for score in deep]
    up = _product(torch.cat([weight for weight, _ in first]), torch.cat([bias for _, bias in first]))
    return nn.Sequential(norm, up, nn.SiLU(), _product(torch.block_diag(*(score.down.weight for score in deep))))


def _without_weights(norm: nn.Module) -> nn.Module:
    if isinstance(norm, nn.LayerNorm):
        return nn.LayerNorm(norm.normalized_shape, norm.eps, elementwise_affine=False)
    return norm


def _with_norm(score: DepthScore) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias that do to a hidden state without the norm's weight and bias what `up` does to one with them."""
    up, norm = score.up, score.norm
    if isinstance(norm, nn.LayerNorm):
        return up.weight * norm.weight, up.weight @ norm.bias
    return up.weight, up.bias


def _product(weight: torch.Tensor, bias: torch.Tensor | None = None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear
