"""Let gates harden over a training: what routers say is divided by a temperature that falls.

A gate is then `gate(router_logits / temperature)`: the sigmoid of soft gates becomes a step. When the training is over
the temperature becomes part of the routers, so that a folder needs not know of it, and gates stay what they are.
"""

from typing import Any

import torch
from torch import nn

from modcompile.modeling import RoutedForCausalLM


class GateTemperature:
    """Of all gates of a model; 1 until it is told otherwise."""

    def __init__(self, model: RoutedForCausalLM, end: float) -> None:
        self._routers: list[Any] = list(model.routers.values())
        self._end = end
        self._value = 1.0
        gates = {module for name, module in model.graph.named_modules() if name.rpartition(".")[2] == "gate"}
        for gate in gates:
            gate.register_forward_pre_hook(self._divide)

    def set_progress(self, progress: float) -> None:
        """After a share of the training, in [0, 1], it is `end ** progress`: it falls by equal factors."""
        self._value = self._end**progress

    @torch.no_grad()
    def move_into_routers(self) -> None:
        """Divide scores and biases by the last temperature, and go on at 1."""
        for router in self._routers:
            router.score.down.weight /= self._end
            router.bias /= self._end
        self._end = self._value = 1.0

    def _divide(self, _: nn.Module, logits: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        return (logits[0] / self._value,)
