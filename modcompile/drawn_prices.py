"""Train gates for many budgets at once: each sequence of a batch has its own price of a block.

A gate is then `gate(router_logits - log(factor))`, with a factor on the price for each sequence. So what a router says,
but for a constant, comes to be the logarithm of what a block is worth to a token, and any threshold on it a budget that
has been trained for; adapters see tokens that skip much and tokens that skip little. Losses count by the inverse of the
factor: at a high price more is lost, and would otherwise be nearly all that is learned from.
"""

import math

import torch
from torch import nn

from modcompile.modeling import RoutedForCausalLM


class DrawnPrices:
    """Of all gates of a model, in training, until it stops; evaluated, gates are what they would be without."""

    def __init__(self, model: RoutedForCausalLM, spread: float) -> None:
        self._log_spread = math.log(spread)
        self._device = model.device
        self._shift = torch.zeros(1, 1, 1)
        gates = {module for name, module in model.graph.named_modules() if name.rpartition(".")[2] == "gate"}
        self._hooks = [gate.register_forward_pre_hook(self._subtract) for gate in gates]

    def set(self, places: torch.Tensor) -> torch.Tensor:
        """Factors for the sequences of the next batch, `[B]`, from `1 / spread` at place 0 to `spread` at 1.

        Their logarithms are as evenly spaced as `places [B]` are: every batch should have high and low ones
        (`draw_places`).
        """
        logarithms = ((2 * places - 1) * self._log_spread).to(self._device)
        self._shift = logarithms.view(-1, 1, 1)
        return logarithms.exp()

    def stop(self) -> None:
        """Let gates be what they would be without, in training, too."""
        for hook in self._hooks:
            hook.remove()

    def _subtract(self, gate: nn.Module, logits: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        return (logits[0] - self._shift.to(logits[0]),) if gate.training else logits
