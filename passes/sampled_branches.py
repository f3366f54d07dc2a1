"""Run one of several branches in a training step, and have it stand for the mixture of all.

Before::

    y = weights[…, 0] * branch_0(hidden, …) + weights[…, 1] * branch_1(hidden, …) + …

After, with a k that is drawn with q, the mean of the weights over the batch::

    y = branch_k(hidden, …)
    y = y + (weights[…, k] - its value) / q_k * (y - hidden)

Forward that is branch_k. Backward it is, on average over k, the gradient that the mixture has there: each branch is
drawn q_k of the time and then counts 1 / q_k. The skip path, `- hidden`, is common to all branches and so moves no
mean, as the weights sum to one; it only makes the gradient vary less. A step costs little more than one of the block.
"""

from collections.abc import Sequence

import torch
from torch import fx, nn


class SampledBranches(nn.Module):
    """`*inputs, weights [B, S, P]` → the outputs of one branch; out of training, those of `mixed`."""

    def __init__(self, branches: Sequence[fx.GraphModule], mixed: fx.GraphModule) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)
        self.mixed = mixed

    def forward(self, *arguments: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if not self.training:
            outputs: tuple[torch.Tensor, ...] = self.mixed(*arguments)
            return outputs
        *inputs, weights = arguments
        chances = weights.detach().flatten(0, -2).mean(0)
        drawn = int(torch.multinomial(chances, 1))
        hidden, *cache = self.branches[drawn](*inputs)
        weight = weights[..., drawn : drawn + 1]
        change = (weight - weight.detach()) / chances[drawn] * (hidden - inputs[0]).detach()
        return hidden + change, *cache
