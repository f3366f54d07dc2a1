"""From a base model to a routed model: tracing and the passes, in order."""

from collections.abc import Mapping

from torch import fx, nn
from transformers import PreTrainedModel

from modcompile.config import RouterConfig
from modcompile.granularity import Granularity, halves_blocks
from modcompile.modeling import RoutedForCausalLM
from modcompile.passes import drop_guards, group_blocks, insert_depth_gates, outline_blocks, repeat_blocks
from modcompile.passes.outlined_form import block_calls, results
from modcompile.passes.split_blocks import split_blocks
from modcompile.routers import DepthRouter, HardConcreteGate, SoftGate, StraightThroughGate
from modcompile.skip_adapters import make_adapter
from modcompile.stages import stage
from modcompile.tracing import find_layers, layers_are_alike, trace_causal_lm, truncated

_GATES: dict[str, type[nn.Module]] = {
    "soft": SoftGate,
    "straight_through": StraightThroughGate,
    "hard_concrete": HardConcreteGate,
}
_TRACED_DEPTH = 2  # what it takes to see where one block ends and the next begins


def build_routed(base: PreTrainedModel, config: RouterConfig, *, use_cache: bool = True) -> RoutedForCausalLM:
    """A routed model with new routers, soft; untrained and run hard, it is the dense model.

    Without `use_cache` the graph takes and returns no keys and values, which suits training.

    Raises:
        ConfigError: `config` selects no layer of this model.
        UnsupportedModelError: the model can't be traced, or is no chain of decoder blocks.
    """
    dense = trace_layers(base, config.granularity, use_cache=use_cache)
    model = RoutedForCausalLM(base, insert_routers(dense, config), config)
    model.eval()
    return model


def trace_again(model: RoutedForCausalLM) -> fx.GraphModule:
    """The soft graph of a model whose dtype has changed, with the routers that it has.

    A trace records the dtypes of its intermediate results: those of a norm in float32, say, within a model in bfloat16.

    Raises:
        UnsupportedModelError: the model can't be traced in its new dtype.
    """
    dense = trace_layers(model.base, model.router_config.granularity, use_cache=model.takes_cache)
    grouped = group_blocks(dense, model.gated_layers)
    return _insert_gates(grouped, model.routers, model.adapters, model.router_config).train(model.training)


@stage("outlining blocks")
def trace_outlined(base: PreTrainedModel, *, use_cache: bool = True) -> fx.GraphModule:
    """The dense graph of `base` in outlined form; parameters are shared with it.

    Where the layers are alike, two are traced and stamped out for all of them.

    Raises:
        UnsupportedModelError: the model can't be traced, or is no chain of decoder blocks.
    """
    layers = find_layers(base)
    if not layers_are_alike(layers):
        return outline_blocks(drop_guards(trace_causal_lm(base, use_cache=use_cache)))
    with truncated(layers, _TRACED_DEPTH):
        outlined = outline_blocks(drop_guards(trace_causal_lm(base, use_cache=use_cache)))
    return repeat_blocks(outlined, list(layers))


def trace_layers(base: PreTrainedModel, granularity: Granularity, *, use_cache: bool = True) -> fx.GraphModule:
    """The same, with a block for each half of a layer if gates are to decide on halves.

    Raises:
        UnsupportedModelError: that, or a block can't be halved.
    """
    dense = trace_outlined(base, use_cache=use_cache)
    return split_blocks(dense) if halves_blocks(granularity) else dense


@stage("inserting routers")
def insert_routers(dense: fx.GraphModule, config: RouterConfig) -> fx.GraphModule:
    """The soft routed graph, with new routers where `config` wants them.

    Raises:
        ConfigError: `config` selects no layer of this model.
    """
    grouped = group_blocks(dense, _gated_layers(dense, config))
    return _insert_gates(grouped, make_routers(dense, config), make_adapters(dense, config), config)


def _insert_gates(
    grouped: fx.GraphModule,
    routers: Mapping[int, nn.Module],
    adapters: Mapping[int, nn.Module],
    config: RouterConfig,
) -> fx.GraphModule:
    return insert_depth_gates(
        grouped, routers, make_gate(config), gates_per_decision=config.gates_per_decision, adapters=adapters
    )


def make_routers(dense: fx.GraphModule, config: RouterConfig) -> dict[int, nn.Module]:
    """New routers for an outlined graph without groups, by the first layer of each gate that `config` wants, in order.

    Raises:
        ConfigError: `config` selects no layer of this model.
    """
    like = next(dense.parameters())
    routers: dict[int, nn.Module] = {}
    for layers in _gated_layers(dense, config):
        router = DepthRouter(
            hidden_size_of(dense),
            config.router_hidden_size,
            dropout=config.router_dropout,
            layer_norm=config.layer_norm_router_input,
            init_bias=config.init_bias,
        )
        routers[layers.start] = router.to(device=like.device, dtype=like.dtype)
    return routers


def make_adapters(dense: fx.GraphModule, config: RouterConfig) -> dict[int, nn.Module]:
    """New adapters for an outlined graph without groups, by the routed layers; none if `config` wants none.

    Raises:
        ConfigError: `config` selects no layer of this model.
    """
    like = next(dense.parameters())
    adapters = {}
    for layer in (layer for layers in _gated_layers(dense, config) for layer in layers):
        adapter = make_adapter(config.skip_adapter, hidden_size_of(dense), config.adapter_rank)
        if adapter is not None:
            adapters[layer] = adapter.to(device=like.device, dtype=like.dtype)
    return adapters


def _gated_layers(dense: fx.GraphModule, config: RouterConfig) -> list[range]:
    count = len(block_calls(dense.graph))
    return config.gated_layers(count // 2 if halves_blocks(config.granularity) else count)


def make_gate(config: RouterConfig) -> nn.Module:
    """What makes gates of the routers' logits."""
    return _GATES[config.gate]()


def hidden_size_of(dense: fx.GraphModule) -> int:
    """The H of the hidden states `[B, T, H]` in an outlined graph."""
    return int(results(block_calls(dense.graph)[0])[0].meta["val"].shape[-1])
