"""What straight-through gradients leave out: how the loss bends between an open gate and a closed one.

With everything else as it is, executing a block that is skipped, or skipping one that is executed, changes a loss, to
the second order, by

    loss(1) - loss(0) = loss'(g) + (1/2 - g) * loss''

while a straight-through gradient takes `loss'(g)` for all of it. Of the divergence from the dense model, which is least
where every gate is open, that says of an open gate that closing it costs nothing, and of a closed one that opening it
gains twice what it does: gates that are seldom closed then close too often, and those that often are, too seldom. Here
the second term is added to the gradient of every gate.

The second derivative is that of Gauss and Newton: for a language model's loss and for a divergence from other
predictions alike, the mean of `s'(g) ** 2` over labels that are drawn from the model's own predictions, where `s` is
the negative logarithm of their probability (Amari, 1998). One label is drawn for every token of a step, for one more
backward pass through the model. As labels are drawn independently, the square of what all of them say together is, in
the mean, the sum over the tokens that a gate has an effect on.

A square counts as a nat at most. Few of them are of tens and hundreds, where nothing is left of the second order, and
they were nearly all of the gradient: what is to be clipped for them leaves nothing to learn for adapters, and what Adam
divides by stays large for the rest of a short training. A block that saves a token a nat is worth executing at any
price, whatever it saves beyond.
"""

import torch
from torch import nn

from modcompile.drawn_labels import label_gradient
from modcompile.modeling import RoutedCausalLMOutput, RoutedForCausalLM

_MOST = 1.0  # of a squared slope, in nats


class GateCurvature:
    """Of all gates of a model with straight-through ones, in training, until it stops.

    Meanwhile routers do not teach what lies in front of them: adapters learn from the loss alone, not from the larger
    gradients of the gates as well. (It was not tried otherwise.)
    """

    def __init__(self, model: RoutedForCausalLM) -> None:
        self._hooks = [router.register_forward_pre_hook(_detach) for router in model.routers.values()]

    def correction(
        self, output: RoutedCausalLMOutput, is_predicting: torch.Tensor, shares: torch.Tensor
    ) -> torch.Tensor:
        """A scalar of value 0, whose gradient at the gates is what that of the summed loss leaves out.

        `is_predicting [B, T]` are the tokens with a loss behind them, `shares [B]` what the loss of each sequence
        counts.
        """
        assert output.gates is not None and output.logits is not None
        gates = list(dict.fromkeys(output.gates))  # layers that share a gate each have it
        of_labels = label_gradient(output.logits, is_predicting)
        slopes = torch.autograd.grad(output.logits, gates, of_labels, retain_graph=True)
        weights = shares.view(-1, 1, 1)
        terms = [
            (weights * (0.5 - gate.detach()) * slope.square().clamp(max=_MOST) * gate).sum()
            for gate, slope in zip(gates, slopes, strict=True)
        ]
        total = torch.stack(terms).sum()
        return total - total.detach()

    def stop(self) -> None:
        """Let routers teach what lies in front of them again."""
        for hook in self._hooks:
            hook.remove()


def _detach(router: nn.Module, hidden_state: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    return (hidden_state[0].detach(),) if router.training else hidden_state
