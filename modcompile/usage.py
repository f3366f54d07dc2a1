"""How much of a routed model was used."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch


@dataclass
class RoutingUsage:
    """Sums of gates or routing masks over tokens that are not padding, for each routed layer."""

    layers: tuple[int, ...]
    work: Mapping[int, float] = field(default_factory=dict)
    """What each layer counts in the mean over layers; 1 if nothing is said."""
    tokens: int = 0
    _active: list[float] = field(default_factory=list)

    def update(self, gates: Sequence[torch.Tensor], tokens: torch.Tensor) -> None:
        """Add a call: gates or routing masks `[B, T, 1]`, one a routed layer, and the tokens' mask `[B, T]`."""
        added = active_tokens(gates, tokens).detach().tolist()
        previous = self._active or [0.0] * len(added)
        self._active = [old + new for old, new in zip(previous, added, strict=True)]
        self.tokens += int(tokens.sum())

    @property
    def active_ratio(self) -> float:
        """Share of (token, routed layer) pairs that were executed, by their work, in [0, 1]; NaN before any call."""
        ratios = self.active_ratio_per_layer
        work = {layer: self.work.get(layer, 1.0) for layer in ratios}
        done = sum(work[layer] * ratio for layer, ratio in ratios.items())
        return done / sum(work.values()) if work else float("nan")

    @property
    def active_ratio_per_layer(self) -> dict[int, float]:
        """The same for each routed layer, by its index in the model."""
        if not self.tokens:
            return {}
        return {layer: active / self.tokens for layer, active in zip(self.layers, self._active, strict=True)}


def active_tokens(gates: Sequence[torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    """How many tokens each layer was active for: `[R]`, from R gates `[B, T, 1]` and the tokens' mask `[B, T]`.

    Differentiable in the gates; padding does not count.
    """
    stacked = torch.stack([gate.squeeze(-1) for gate in gates]).float()
    return (stacked * tokens.float()).sum((1, 2))
