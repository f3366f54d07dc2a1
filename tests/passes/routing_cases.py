"""Random cases of routed inference, for properties."""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import fx
from transformers import PreTrainedModel

from modcompile.passes.outlined_form import routed_calls
from modcompile.routers import DepthRouter
from tests.model_inputs import ModelInputs, Padding, make_inputs
from tests.tiny_graphs import random_routers

ROUTED_LAYERS = (0, 2)


@dataclass(frozen=True)
class RoutingCase:
    """Sizes, padding, thresholds and seeds, drawn apart from the model they are for."""

    seed: int
    batch: int
    length: int
    past_length: int
    padding: Padding
    thresholds: dict[int, float]

    def inputs(self, model: PreTrainedModel) -> ModelInputs:
        return make_inputs(model, self.batch, self.length, self.past_length, self.padding, self.seed)

    def routers(self) -> dict[int, DepthRouter]:
        return random_routers(ROUTED_LAYERS, self.seed)

    def load(self, gm: fx.GraphModule) -> None:
        """Write thresholds and router weights into a hard or lowered graph: it is much quicker than making one."""
        gm.get_buffer("routing_threshold").copy_(self.threshold)
        routers = self.routers()
        for bias, router in zip(gm.get_submodule("routing_inputs").parameters(), routers.values(), strict=True):
            bias.copy_(router.bias)
        for call, router in zip(routed_calls(gm), routers.values(), strict=True):
            gm.get_submodule(f"{call.target}.decide.score").load_state_dict(router.score.state_dict())

    @property
    def threshold(self) -> torch.Tensor:
        """What the graph's buffer `routing_threshold` is to hold."""
        return torch.tensor([self.thresholds[layer] for layer in ROUTED_LAYERS])

    def is_open(self) -> dict[int, torch.Tensor]:
        """A random mask `[B, T, 1]` for each routed layer: all, none or some of the tokens."""
        generator = torch.Generator().manual_seed(self.seed)
        shares = torch.tensor([0.0, 0.5, 1.0])[torch.randint(3, (len(ROUTED_LAYERS),), generator=generator)]
        shape = (self.batch, self.length, 1)
        return {
            layer: torch.rand(shape, generator=generator) < share
            for layer, share in zip(ROUTED_LAYERS, shares, strict=True)
        }

    def is_near_threshold(self, gates: list[torch.Tensor]) -> bool:
        """Whether rounding could turn a decision, given each routed layer's gates in order."""
        pairs = zip(gates, self.threshold, strict=True)
        return any(bool(((gate - threshold).abs() < 1e-4).any()) for gate, threshold in pairs)


def routing_cases(*, min_length: int = 1, max_past: int = 5) -> st.SearchStrategy[RoutingCase]:
    return st.builds(
        RoutingCase,
        seed=st.integers(0, 2**16),
        batch=st.integers(1, 3),
        length=st.integers(min_length, 7),
        past_length=st.integers(0, max_past),
        padding=st.sampled_from(["none", "left", "right"]),
        thresholds=st.fixed_dictionaries({layer: st.floats(0.05, 0.95) for layer in ROUTED_LAYERS}),
    )
