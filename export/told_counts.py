"""What an artifact tells of its routing, summed up while text is generated."""

from collections.abc import Mapping

import torch

from modcompile.counted_bits import CountedBits
from modcompile.export.session import PRECISION, ROUTING, RoutedSession
from modcompile.export.step_binding import Array
from modcompile.layer_ranges import name_of
from modcompile.text_generator import describe_active_ratio
from modcompile.usage import RoutingUsage


class ToldCounts:
    """Active ratio and bits of the steps so far, of tokens that are not padding.

    `usage` is None where the artifact has no routing masks, or does not tell them; `bits` is None where it does not
    choose precisions, or does not tell them. Layers whose gates were folded count with what they always do.
    """

    def __init__(self, session: RoutedSession) -> None:
        folded = session.always_active | session.always_skipped
        told = {layer for layers in session.gated_layers for layer in layers}
        routed_layers = tuple(sorted(told | folded)) if len(session.gated_layers) == session.num_thresholds else ()
        self.usage = RoutingUsage(routed_layers, session.work) if routed_layers else None
        self.bits = CountedBits() if session.precision_layers else None
        self._session = session

    def update(self, told: Mapping[str, Array], tokens: Array) -> None:
        """Add a step: masks or bits `[B, T]` by the output's name, and the mask `[B, T]` of what is a token."""
        mask = torch.from_numpy(tokens)
        if self.usage is not None:
            masks = {layer: torch.ones_like(mask, dtype=torch.bool) for layer in self._session.always_active}
            masks |= {layer: torch.zeros_like(mask, dtype=torch.bool) for layer in self._session.always_skipped}
            for layers in self._session.gated_layers:
                masks |= dict.fromkeys(layers, torch.from_numpy(told[f"{ROUTING}{name_of(layers)}"]))
            self.usage.update([masks[layer][..., None] for layer in self.usage.layers], mask)
        if self.bits is not None:
            chosen = [told[f"{PRECISION}{layer}"] for layer in self._session.precision_layers]
            self.bits.update(list(map(torch.from_numpy, chosen)), mask)

    def describe(self) -> str:
        """The bits, or the active ratio, in a few words."""
        if self.bits is not None:
            return self.bits.describe()
        if self.usage is not None:
            return describe_active_ratio(self.usage.active_ratio)
        untold = "average bits" if self._session.bias_shape[0] else "active ratio"
        return f"{untold} not told by this artifact (export it with --emit_routing)"
