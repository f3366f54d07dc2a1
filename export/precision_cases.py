"""What an artifact of several precisions is tried on: biases and thresholds that show every branch of every block."""

from collections.abc import Sequence
from typing import Literal

import torch

from modcompile.errors import VerificationError
from modcompile.export.module_outputs import module_outputs
from modcompile.export.verification_inputs import Case, split_texts, splitting_threshold
from modcompile.layerwise import LayerwiseQuantizeForCausalLM
from modcompile.passes.harden_gates import score_and_bias

_FORCED = 1e4
"""Added to a logit, more than any other: finite, as a file of JSON can't hold infinity."""

_EXECUTE, _SKIP = 0.0, 2.0
Bias = tuple[tuple[float, ...], ...]


def precision_cases(
    model: LayerwiseQuantizeForCausalLM, texts: Sequence[Sequence[int]], hard_threshold: float
) -> list[Case]:
    """The artifact's own decisions on each of 8 rows alone, and forced ones on all rows as a padded batch.

    `texts` are 8 rows of token ids; `hard_threshold` is that of the artifact's depth gates, if it has some.

    Raises:
        VerificationError: nothing would show what a block does with tokens of different bits, as its router tells no
            tokens apart.
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
    if model.router_config.router_scope == "token" and (count > 1 or gated):
        thresholds = [_EXECUTE] * gated if count > 1 else _splitting(model, prefills)
        bias = _balanced(model, prefills)
        _check_tokens_differ(model, prefills, thresholds, bias, hard_threshold)
        others.append(("tokens at different bits", thresholds, bias))
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
    with module_outputs(model.routers) as logits:
        for prefill in prefills:
            model.infer_forward(torch.tensor([prefill], device=model.device))
    of_layers = [torch.cat([each.flatten(0, -2) for each in of_layer]) for of_layer in logits.values()]
    return tuple(tuple((-of_layer.mean(0)).tolist()) for of_layer in of_layers)


def _splitting(model: LayerwiseQuantizeForCausalLM, prefills: Sequence[Sequence[int]]) -> list[float]:
    """For each depth gate a threshold that opens it for about half of the tokens."""
    gates = {layer: score_and_bias(router, model.device) for layer, router in model.depth_routers.items()}
    with module_outputs({layer: score for layer, (score, _) in gates.items()}) as scores:
        for prefill in prefills:
            model.infer_forward(torch.tensor([prefill], device=model.device))
    return [
        splitting_threshold(torch.cat([each.flatten() for each in scores[layer]]) + bias.detach())
        for layer, (_, bias) in gates.items()
    ]


def _check_tokens_differ(
    model: LayerwiseQuantizeForCausalLM,
    prefills: Sequence[Sequence[int]],
    thresholds: Sequence[float],
    bias: Bias,
    hard_threshold: float,
) -> None:
    found: dict[int, set[int]] = {layer: set() for layer in model.routers}
    model.set_precision_bias(torch.tensor(bias))
    if thresholds:
        model.set_hard_threshold(thresholds)
    for prefill in prefills:
        num_bits = model.infer_forward(torch.tensor([prefill], device=model.device)).num_bits or ()
        for seen, bits in zip(found.values(), num_bits, strict=True):
            seen.update(bits.unique().tolist())
    model.set_precision_bias(None)
    if thresholds:
        model.set_hard_threshold(hard_threshold)
    choosing = [layer for layer in found if len(model.precisions) > 1 or layer in model.depth_routers]
    alike = [layer for layer in choosing if len(found[layer]) == 1]
    if alike:
        more = f" (and of {len(alike) - 1} more)" if len(alike) > 1 else ""
        raise VerificationError(
            f"the router of layer {alike[0]}{more} says the same of every token, so nothing can show that tokens of "
            "different bits are computed as they chose; train the routers, or train with --router_scope sequence"
        )
