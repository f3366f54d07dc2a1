"""Routing without any of our graphs: hooks on the decoder layers of a transformers model.

Every layer runs whole, and so appends its keys and values; what becomes of the hidden state is decided afterwards.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from modcompile.tracing import find_layers
from tests.model_inputs import ModelInputs, run_model

Mix = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(hidden state before the layer, hidden state after it) → what the next layer gets; all `[B, T, H]`."""


def run_reference(model: PreTrainedModel, inputs: ModelInputs, mixes: Mapping[int, Mix]) -> tuple[torch.Tensor, ...]:
    """What a routed graph returns before its gates or masks: logits, present keys and values."""
    with _mixed(find_layers(model), mixes):
        return run_model(model, inputs)


def skip(before: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    """No change for any token."""
    return before


def choose(is_open: torch.Tensor, adapter: nn.Module | None = None) -> Mix:
    """The layer for the tokens where `is_open [B, T, 1]`; for the others its adapter, or no change."""
    skipped = adapter or nn.Identity()
    return lambda before, after: torch.where(is_open, after, skipped(before))


def decide(
    routers: Mapping[int, nn.Module],
    thresholds: Mapping[int, float],
    inputs: ModelInputs,
    followers: Iterable[int] = (),
    adapters: Mapping[int, nn.Module] | None = None,
) -> tuple[dict[int, Mix], list[torch.Tensor]]:
    """The layer for the tokens whose gate is above the layer's threshold, and the list that gates will be added to.

    Padding is skipped. `followers` are layers without a router of their own, that do as the layer before them did;
    `adapters` what tokens that skip a layer with a router go through.
    """
    is_token = inputs.is_token.unsqueeze(-1)
    gates: list[torch.Tensor] = []
    is_open: list[torch.Tensor] = []

    def decided(layer: int) -> Mix:
        def chosen(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
            gates.append(torch.sigmoid(routers[layer](before)))
            is_open.append(is_token & (gates[-1] > thresholds[layer]))
            return choose(is_open[-1], (adapters or {}).get(layer))(before, after)

        return chosen

    def followed(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        return torch.where(is_open[-1], after, before)

    return {layer: decided(layer) for layer in routers} | dict.fromkeys(followers, followed), gates


@contextmanager
def _mixed(layers: nn.ModuleList, mixes: Mapping[int, Mix]) -> Iterator[None]:
    def hook(mix: Mix) -> Callable[..., Any]:
        def mixed(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            before = args[0] if args else kwargs["hidden_states"]
            if isinstance(output, tuple):
                return (mix(before, output[0]), *output[1:])
            return mix(before, output)

        return mixed

    handles = [layers[index].register_forward_hook(hook(mix), with_kwargs=True) for index, mix in mixes.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
