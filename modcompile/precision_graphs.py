"""The graphs of a model of several precisions: from its trace, its weights and its routers."""

from collections.abc import Mapping

from torch import fx, nn

from modcompile.config import RouterConfig
from modcompile.errors import ConfigError
from modcompile.packed_router import PackedRouter
from modcompile.passes import choose_precision, insert_precision_branches
from modcompile.passes.outlined_form import block_calls
from modcompile.precision_branches import PrecisionCheckpoint, PrecisionWeights
from modcompile.precision_config import PrecisionRouterConfig
from modcompile.precision_routers import PrecisionMixer, PrecisionRouter
from modcompile.routed_graph import hidden_size_of, make_adapters, make_gate, make_routers, trace_outlined
from modcompile.routers import HardenedGate


def check_composable(depth: RouterConfig) -> None:
    """Refuse depth gates that blocks of several precisions can't have.

    Raises:
        ConfigError: blocks share a gate or a decision, but to be skipped is one of the choices that each makes by
            itself; or they are of halves of blocks.
    """
    if depth.granularity != "block":
        raise ConfigError(
            f"blocks that choose their bits are skipped as a whole, but --granularity is {depth.granularity!r}; make "
            f"depth gates with --granularity block"
        )
    for name in ("blocks_per_gate", "gates_per_decision"):
        if (shared := getattr(depth, name)) > 1:
            raise ConfigError(
                f"blocks that choose their bits need a depth gate each, decided by itself, but --{name} is {shared}; "
                f"make depth gates with --{name} 1"
            )


class PrecisionGraphs:
    """Makes the graphs; they share the routers and adapters made here, the mixer, and the parameters of the base.

    Raises:
        ConfigError: see `check_composable`; or `depth` selects no layer of this model.
        UnsupportedModelError: the base can't be traced, or is no chain of decoder blocks.
    """

    def __init__(
        self, checkpoint: PrecisionCheckpoint, config: PrecisionRouterConfig, depth: RouterConfig | None
    ) -> None:
        if depth is not None:
            check_composable(depth)
        self._base = checkpoint.base
        self._config = config
        self._weights = PrecisionWeights(checkpoint)
        self._dense = trace_outlined(self._base)
        self._for_tokens = config.router_scope == "token"
        self.routers: dict[int, PrecisionRouter] = {}
        for layer in range(len(block_calls(self._dense.graph))):
            router = PrecisionRouter(
                hidden_size_of(self._dense),
                len(checkpoint.precisions),
                dropout=config.router_dropout,
                for_tokens=self._for_tokens,
            )
            self.routers[layer] = router.to(self._base.device)
        self.depth_routers = {} if depth is None else make_routers(self._dense, depth)
        self.adapters = {} if depth is None else make_adapters(self._dense, depth)
        self.gate = HardenedGate(make_gate(depth or RouterConfig()))
        self.mixer = PrecisionMixer(straight_through=config.precision_mixing == "straight_through")

    def inference(self, *, round_activations: bool = False) -> fx.GraphModule:
        """One precision a block; on request with activations rounded as ONNX Runtime rounds them on a CPU.

        Raises:
            UnsupportedModelError: that is requested of look-up tables.
        """
        weights = self._weights
        branches = weights.rounded_branches(self._dense) if round_activations else weights.branches(self._dense)
        return self._choosing(branches, self.routers)

    def export(self) -> fx.GraphModule:
        """The same on the codes themselves.

        Raises:
            UnsupportedModelError: they are codes of look-up tables.
        """
        routers = {layer: PackedRouter(router) for layer, router in self.routers.items()}
        return self._choosing(self._weights.packed_branches(self._dense), routers)

    def training(self) -> fx.GraphModule:
        """All precisions mixed, or one drawn."""
        # With keys and values where these are mixed, too: each token's as it chose.
        dense = trace_outlined(self._base, use_cache=self._for_tokens)
        return insert_precision_branches(
            dense,
            self._weights.branches(dense),
            self.routers,
            self.mixer,
            sampled=self._config.precision_mixing == "sampled",
            depth_routers=self.depth_routers,
            gate=self.gate,
            adapters=self.adapters,
        )

    def _choosing(
        self, branches: Mapping[int, Mapping[int, fx.GraphModule]], routers: Mapping[int, nn.Module]
    ) -> fx.GraphModule:
        return choose_precision(
            self._dense,
            branches,
            routers,
            for_tokens=self._for_tokens,
            depth_routers=self.depth_routers,
            adapters=self.adapters,
        )
