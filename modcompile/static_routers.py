"""Routers that say the same of every token: a static selection of layers, in the form that routers have.

It is what routers that look at tokens have to beat, with the same adapters and the same training; and where they don't,
an export folds its gates away (`--fold_gates`), and what is left of it is a smaller dense model.
"""

from typing import Any

import torch
from datasets import Dataset
from torch import nn

from modcompile.modeling import RoutedForCausalLM
from modcompile.static_selection import select_static

_CERTAIN = 20.0  # a logit whose sigmoid is 1 in float32
_CANDIDATES = 6


@torch.no_grad()
def close_statically(model: RoutedForCausalLM, blocks: Dataset, target: float, *, batch_size: int = 4) -> list[range]:
    """Close the gates that cost least on `blocks`, as `tokenize_and_pack` makes them, greedily, until the target.

    `target` is the share of the work of routed layers that is done, as near as whole gates come. Returns the layers
    that are left out; their gates are closed for every token, the others open, and what routers had learned is gone.

    Raises:
        DataError: there is no token to predict, or one that the model does not have.
    """
    work = [sum(model.work[layer] for layer in layers) for layers in model.gated_layers]
    skipped = sum(work) * (1 - target)
    selections = select_static(model, blocks, 1 - target, candidates=_CANDIDATES, batch_size=batch_size)
    sizes = [((), 0.0), *((each.closed, sum(work[gate] for gate in each.closed)) for each in selections)]
    closed, _ = min(sizes, key=lambda each: abs(each[1] - skipped))
    for gate, router in enumerate(_routers(model)):
        nn.init.zeros_(router.score.down.weight)
        nn.init.constant_(router.bias, -_CERTAIN if gate in closed else _CERTAIN)
    return [layers for gate, layers in enumerate(model.gated_layers) if gate in closed]


def freeze_routers(model: RoutedForCausalLM) -> None:
    """Leave adapters as all that is trained."""
    for router in _routers(model):
        router.requires_grad_(requires_grad=False)


def _routers(model: RoutedForCausalLM) -> list[Any]:
    return list(model.routers.values())
