"""Routed LLaMAs of 3 layers that go with the tokenizer of `tiny_tokenizer`; their routers decide.

Layers 0 and 2 have routers, or layers 0 and 1 have one together, and layer 2 has one, or each has one and all read what
the first reads.
"""

from functools import cache

from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, set_seed

from modcompile.config import GateKind, RouterConfig
from modcompile.modeling import RoutedForCausalLM
from modcompile.routed_graph import build_routed
from modcompile.routers import DepthRouter
from modcompile.skip_adapters import LowRankAdapter
from tests.tiny_models import HIDDEN_SIZE, INITIALIZER_RANGE

ROUTED_LAYERS = (0, 2)
GATED_LAYERS = (range(2), range(2, 3))
MAX_POSITIONS = 128


def tiny_base(num_hidden_layers: int = 3) -> PreTrainedModel:
    """The model without routers; every call makes the same weights."""
    set_seed(0)
    config = LlamaConfig(
        hidden_size=HIDDEN_SIZE,
        intermediate_size=48,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=300,
        max_position_embeddings=MAX_POSITIONS,
        initializer_range=INITIALIZER_RANGE,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


@cache
def tiny_routed(gate: GateKind, *, use_cache: bool = True) -> RoutedForCausalLM:
    """The routed model; its routers execute some tokens at a threshold of 0.5 and skip others.

    It is made once a process and shared by all tests, which may change its router mode only.
    """
    config = RouterConfig(router_hidden_size=8, router_pattern="every_other", gate=gate)
    model = _deciding(config, use_cache=use_cache)
    assert model.routed_layers == ROUTED_LAYERS
    return model


@cache
def tiny_grouped(gate: GateKind, *, use_cache: bool = True) -> RoutedForCausalLM:
    """The same with linear routers, of which the first decides on two layers."""
    model = _deciding(RouterConfig(router_hidden_size=0, blocks_per_gate=2, gate=gate), use_cache=use_cache)
    assert model.gated_layers == GATED_LAYERS
    return model


@cache
def tiny_decided_at_once(gate: GateKind, *, use_cache: bool = True) -> RoutedForCausalLM:
    """The same with linear routers for all layers, which read the hidden state in front of the first."""
    return _deciding(RouterConfig(router_hidden_size=0, gates_per_decision=3, gate=gate), use_cache=use_cache)


@cache
def tiny_adapted(gate: GateKind, *, use_cache: bool = True) -> RoutedForCausalLM:
    """The same as `tiny_grouped`, with adapters that change what skips."""
    config = RouterConfig(router_hidden_size=0, blocks_per_gate=2, gate=gate, skip_adapter="low_rank", adapter_rank=4)
    model = _deciding(config, use_cache=use_cache)
    for adapter in model.adapters.values():
        assert isinstance(adapter, LowRankAdapter)
        nn.init.normal_(adapter.up.weight, std=0.5)
    return model


def _deciding(config: RouterConfig, *, use_cache: bool) -> RoutedForCausalLM:
    set_seed(0)
    model = build_routed(tiny_base(), config, use_cache=use_cache)
    set_seed(1)
    for router in model.routers.values():
        assert isinstance(router, DepthRouter)
        nn.init.normal_(router.score.down.weight, std=2.0 if config.router_hidden_size else 0.3)
        nn.init.zeros_(router.bias)
    return model
