"""Let a hard model decide, or skip, in another way than it has learned, to compare with what it has."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from modcompile.layer_ranges import name_of
from modcompile.modeling import RoutedForCausalLM


@contextmanager
def without_adapters(model: RoutedForCausalLM) -> Iterator[None]:
    """Tokens that skip a layer stay as they are."""
    handles = [
        adapter.register_forward_hook(lambda _, args, __: args[0].clone()) for adapter in model.adapters.values()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def random_gates(model: RoutedForCausalLM, seed: int) -> Iterator[None]:
    """Every gate of every token is a number between 0 and 1: at a threshold t, a share of 1 - t is executed."""
    graph = model.hard_graph()
    generator = torch.Generator().manual_seed(seed)

    def hook(bias: torch.Tensor) -> Callable[..., torch.Tensor]:
        def decided(_: nn.Module, __: Any, score: torch.Tensor) -> torch.Tensor:
            gate = torch.rand(score.shape, generator=generator).to(score)
            return torch.logit(gate) - bias

        return decided

    handles = []
    for layers, router in zip(model.gated_layers, model.routers.values(), strict=True):
        score = graph.get_submodule(f"blocks.{name_of(layers)}.decide.score")
        bias = getattr(router, "bias", torch.zeros(()))
        handles.append(score.register_forward_hook(hook(bias.detach())))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
