"""Decisions that are hard in the forward pass and can be trained (Bengio et al., 2013, arXiv:1308.3432)."""

import torch


def straight_through(soft: torch.Tensor, hard: torch.Tensor) -> torch.Tensor:
    """`hard`, exactly, with the gradient of `soft`."""
    passed: torch.Tensor = _StraightThrough.apply(soft, hard)
    return passed


class _StraightThrough(torch.autograd.Function):
    """`hard + soft - soft.detach()` without its rounding."""

    @staticmethod
    def forward(ctx: object, soft: torch.Tensor, hard: torch.Tensor) -> torch.Tensor:
        return hard.to(soft.dtype)

    @staticmethod
    def backward(ctx: object, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grads[0], None
