"""Labels that are drawn from a model's own predictions, and what they would teach it.

The gradients of such labels are what second-order estimates are made of (`skip_costs`, `gate_curvature`): the mean of
their squares is the Fisher information (Amari, 1998).
"""

import torch

_TOKENS = 64  # whose logits are worked on at a time, as in `distillation`


@torch.no_grad()
def label_gradient(
    logits: torch.Tensor, is_predicting: torch.Tensor, generator: torch.Generator | None = None
) -> torch.Tensor:
    """The gradient of the summed -log p(label) at `logits [B, T, V]`, with one label drawn for every token of a mask.

    `is_predicting` is `[B, T]`; the other tokens have no gradient. Drawn in float32, whatever the type of the logits.
    """
    flat = logits.flatten(0, 1)
    gradient = torch.zeros_like(flat)
    for rows in is_predicting.flatten().nonzero().squeeze(1).split(_TOKENS):
        probabilities = flat[rows].float().softmax(-1)
        # Not torch.multinomial, which draws a number for every word: that took a quarter of a step.
        below = probabilities.cumsum(-1)
        drawn = torch.rand(below[:, :1].shape, device=below.device, generator=generator) * below[:, -1:]
        labels = torch.searchsorted(below, drawn, right=True).clamp(max=below.shape[-1] - 1)
        minus_one = probabilities.new_tensor(-1.0).expand(labels.shape)
        gradient[rows] = probabilities.scatter_add(1, labels, minus_one).to(gradient.dtype)
    return gradient.view_as(logits)
