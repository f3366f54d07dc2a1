"""Graphs of the tiny models, the dense ones made once a process."""

from collections.abc import Iterable, Mapping
from functools import cache

import torch
from torch import fx, nn
from transformers import PreTrainedModel

from modcompile.passes import drop_guards, group_blocks, harden_gates, insert_depth_gates, outline_blocks
from modcompile.routers import DepthRouter, SoftGate
from modcompile.skip_adapters import LowRankAdapter
from modcompile.tracing import trace_causal_lm
from tests.tiny_models import HIDDEN_SIZE, tiny_model


@cache
def shared_model(architecture: str) -> PreTrainedModel:
    """The model whose parameters all graphs of the architecture share; not to be changed."""
    return tiny_model(architecture)


@cache
def traced_graph(architecture: str, *, use_cache: bool = True) -> fx.GraphModule:
    return trace_causal_lm(shared_model(architecture), use_cache=use_cache)


@cache
def flat_graph(architecture: str, *, use_cache: bool = True) -> fx.GraphModule:
    return drop_guards(traced_graph(architecture, use_cache=use_cache))


@cache
def outlined_graph(architecture: str, *, use_cache: bool = True) -> fx.GraphModule:
    return outline_blocks(flat_graph(architecture, use_cache=use_cache))


def hard_graph(
    architecture: str,
    routers: Mapping[int, nn.Module],
    groups: Iterable[range] = (),
    *,
    gates_per_decision: int = 1,
    adapters: Mapping[int, nn.Module] | None = None,
) -> fx.GraphModule:
    grouped = group_blocks(outlined_graph(architecture), groups)
    soft = insert_depth_gates(grouped, routers, SoftGate(), gates_per_decision=gates_per_decision, adapters=adapters)
    return harden_gates(soft)


def random_adapters(layers: Iterable[int], *, hidden_size: int = HIDDEN_SIZE) -> dict[int, nn.Module]:
    """Skip paths that change a hidden state about as much as a block does."""
    torch.manual_seed(1)
    adapters: dict[int, nn.Module] = {}
    for layer in layers:
        adapter = LowRankAdapter(hidden_size, 4)
        nn.init.normal_(adapter.up.weight, std=0.5)
        adapters[layer] = adapter
    return adapters


def random_routers(
    layers: Iterable[int],
    seed: int = 0,
    *,
    hidden_size: int = HIDDEN_SIZE,
    router_hidden_size: int = 8,
    layer_norm: bool = True,
) -> dict[int, DepthRouter]:
    """Routers whose decisions at a threshold of 0.5 differ from token to token."""
    torch.manual_seed(seed)
    routers = {}
    for layer in layers:
        router = DepthRouter(hidden_size, router_hidden_size, dropout=0.0, layer_norm=layer_norm, init_bias=0.0)
        nn.init.normal_(router.score.down.weight, std=2.0 if router_hidden_size else 0.3)
        nn.init.normal_(router.bias, std=0.3)
        routers[layer] = router.eval()
    return routers
