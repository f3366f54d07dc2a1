"""What a routed model learns from the dense one: to predict what that predicts."""

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import log_softmax, pad
from transformers import PreTrainedModel

_TOKENS = 64  # whose logits are worked on at a time: copies of all take longer, and more memory than a small model


@torch.no_grad()
def dense_logits(base: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Logits `[B, T, V]` of the untouched model, for `input_ids [B, T]` and `attention_mask [B, T]`."""
    position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    output = base(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False)
    logits: torch.Tensor = output.logits
    return logits


def divergences(logits: torch.Tensor, dense: torch.Tensor, is_predicted: torch.Tensor) -> torch.Tensor:
    """KL(dense ‖ routed) in nats, of each of the N tokens that are predicted, `[N]`, row by row.

    `logits` and `dense` are `[B, T, V]`, and only the first has a gradient; `is_predicted [B, T - 1]` is of the tokens
    after the first.
    """
    positions = pad(is_predicted, (0, 1)).flatten().nonzero().squeeze(1)
    found: torch.Tensor = _Divergences.apply(logits.flatten(0, 1), dense.flatten(0, 1), positions)
    return found


class _Divergences(torch.autograd.Function):
    """Of some rows of `[N, V]`; the gradient, routed minus dense probabilities, is found along the way."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, dense: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        gradient = torch.zeros_like(logits) if ctx.needs_input_grad[0] else None
        found = []
        for rows in positions.split(_TOKENS):
            ours, theirs = (log_softmax(each[rows].float(), -1) for each in (logits, dense))
            probabilities = theirs.exp()
            found.append((probabilities * (theirs - ours)).sum(-1))
            if gradient is not None:
                gradient[rows] = (ours.exp() - probabilities).to(gradient.dtype)
        ctx.save_for_backward(gradient, positions)
        return torch.cat(found)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_found: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        gradient, positions = ctx.saved_tensors
        scale = of_found.new_zeros(len(gradient)).index_put((positions,), of_found)
        return (gradient * scale.unsqueeze(1)).to(gradient.dtype), None, None
