"""What an artifact of several precisions is tried on: biases and thresholds that show every branch of every block."""

from collections.abc import Sequence
from typing import Literal

import torch

from modcompile.export.verification_inputs import Case, split_texts
from modcompile.layerwise import LayerwiseQuantizeForCausalLM

_FORCED = 1e4
"""Added to a logit, more than any other: finite, as a file of JSON can't hold infinity."""

_EXECUTE, _SKIP = 0.0, 2.0
Bias = tuple[tuple[float, ...], ...]


def precision_cases(
    model: LayerwiseQuantizeForCausalLM, texts: Sequence[Sequence[int]], hard_threshold: float
) -> list[Case]:
    """The artifact's own decisions on each of 8 rows alone, and forced ones on all rows as a padded batch.

    `texts` are 8 rows of token ids; `hard_threshold` is that of the artifact's depth gates, if it has some.
    """
    prefills, decodes = split_texts(model.config, texts)
    layers, gated = len(model.routers), len(model.depth_routers)
    own = (hard_threshold,) * gated
    untouched = _bias(model, [None] * layers)
    cases = [
        Case("own decisions, row by row", own, (prefill,), (decode,), precision_bias=untouched)
        for prefill, decode in zip(prefills, decodes, strict=True)
    ]
    count = len(model.precisions)
    others: list[tuple[str, Sequence[float], Bias]] = [("own decisions, batch", own, untouched)]
    for index, bits in enumerate(model.precisions):
        others.append((f"all at {bits} bits", [_EXECUTE] * gated, _bias(model, [index] * layers)))
    others.append(
        ("another one in each layer", [_EXECUTE] * gated, _bias(model, [layer % count for layer in range(layers)]))
    )
    if gated:
        others.append(("all skipped", [_SKIP] * gated, untouched))
        others.append(("every other one skipped", [(_EXECUTE, _SKIP)[layer % 2] for layer in range(gated)], untouched))
    if model.router_config.router_scope == "token":
        others.append(("tokens at different bits", own, _balanced(model, prefills)))
    sides: list[Literal["left", "right"]] = ["left", "right"]
    return cases + [
        Case(name, tuple(thresholds), prefills, decodes, sides[index % 2], bias)
        for index, (name, thresholds, bias) in enumerate(others)
    ]


def _bias(model: LayerwiseQuantizeForCausalLM, forced: Sequence[int | None]) -> Bias:
    """For each layer which of the precisions is forced, or None to leave it to its router."""
    return tuple(
        tuple(_FORCED if index == wanted else 0.0 for index in range(len(model.precisions))) for wanted in forced
    )


def _balanced(model: LayerwiseQuantizeForCausalLM, prefills: Sequence[Sequence[int]]) -> Bias:
    """For each layer what takes the mean out of its router's logits, so that tokens differ if the router tells them."""
    seen: dict[int, list[torch.Tensor]] = {layer: [] for layer in model.routers}
    handles = [
        router.register_forward_hook(lambda _, __, logits, layer=layer: seen[layer].append(logits.flatten(0, -2)))
        for layer, router in model.routers.items()
    ]
    try:
        for prefill in prefills:
            model.infer_forward(torch.tensor([prefill], device=model.device))
    finally:
        for handle in handles:
            handle.remove()
    return tuple(tuple((-torch.cat(logits).mean(0)).tolist()) for logits in seen.values())
