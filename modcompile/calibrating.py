"""Find the thresholds at which a routed model spends what it shall.

What a gate says depends on what the gates before it have skipped, so thresholds can't be read off the gates of one
pass. Each pass runs the model hard, at the thresholds found so far, and sets them to the quantile of what the gates
said; the gates of the next pass then differ little, and the one after that hardly.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from datasets import Dataset

from modcompile.calibrated_thresholds import CalibratedThresholds, ThresholdScope
from modcompile.config import check
from modcompile.layer_ranges import name_of
from modcompile.modeling import RoutedForCausalLM
from modcompile.restored_routing import restored_routing
from modcompile.text_loss import batches, count_predicted_tokens
from modcompile.tracing import eval_mode
from modcompile.weighted_quantile import weighted_quantile

TOLERANCE = 0.005
_MOST_PASSES = 12
_DAMPED_AFTER = 4


@torch.no_grad()
def calibrate_thresholds(
    model: RoutedForCausalLM,
    blocks: Dataset,
    target: float,
    scope: ThresholdScope,
    *,
    batch_size: int = 4,
    shifts: torch.Tensor | None = None,
) -> CalibratedThresholds:
    """Thresholds with which `target` of the (token, routed layer) pairs of `blocks` are executed; the nearest found.

    `global`: one threshold for all gates, so that a token skips what is thought to matter least. `per_layer`: each gate
    executes the same share of tokens. `searched`: those of all gates are as far from each other, in logits, as `shifts
    [gates]` (`search_thresholds` finds them). The router mode of the model and its usage are then as they were.

    Raises:
        ConfigError: `target` is outside of [0, 1], or `batch_size` is below 1.
        DataError: there is no token to predict, or one that the model does not have.
    """
    check("target_active_ratio", target, at_least=0, at_most=1)
    check("batch_size", batch_size, at_least=1)
    count_predicted_tokens(blocks, model.config.vocab_size)
    gates = len(model.gated_layers)
    work = [sum(model.work[layer] for layer in layers) for layers in model.gated_layers]
    sizes = torch.tensor(work, dtype=torch.float64)
    moved = torch.zeros(gates, dtype=torch.float64) if shifts is None else shifts.double()
    nearest = None
    logits = moved
    with restored_routing(model), eval_mode(model):
        for number in range(_MOST_PASSES):
            thresholds = torch.sigmoid(logits).tolist()
            said, ratio = _pass(model, blocks, thresholds, batch_size)
            found = CalibratedThresholds(target, tuple(thresholds), ratio, scope)
            # Of thresholds that are no one's quantiles, a right mean says nothing of each gate's share.
            is_found = number > 0 or scope != "per_layer"
            if is_found and (nearest is None or abs(ratio - target) < abs(nearest.active_ratio - target)):
                nearest = found
            if nearest is not None and abs(nearest.active_ratio - target) <= TOLERANCE:
                break
            wanted = moved + _quantiles(said - moved.unsqueeze(1), sizes, target, scope)
            # Where decisions depend much on those before, whole steps go back and forth around what is looked for.
            logits = wanted if number < _DAMPED_AFTER else (logits + wanted) / 2
    assert nearest is not None
    return nearest


def _pass(
    model: RoutedForCausalLM, blocks: Dataset, thresholds: list[float], batch_size: int
) -> tuple[torch.Tensor, float]:
    """Router logits of all tokens, `[gates, tokens]`, and the share that is executed at these thresholds."""
    model.set_router_mode(thresholds)
    model.reset_usage()
    rows: list[torch.Tensor] = []
    with _listening(model) as heard:
        for batch in batches(blocks, batch_size, model.device):
            heard.clear()
            model(batch["input_ids"], batch["attention_mask"], use_cache=False)
            is_token = batch["attention_mask"] != 0
            rows.append(torch.stack([logits.squeeze(-1)[is_token] for logits in heard]))
    return torch.cat(rows, 1).double().cpu(), model.active_ratio


def _quantiles(said: torch.Tensor, sizes: torch.Tensor, target: float, scope: ThresholdScope) -> torch.Tensor:
    """The logits `[gates]` below or at which `1 - target` of what was said lies; gates weigh as their layers do."""
    gates, tokens = said.shape
    if scope == "per_layer":
        return torch.stack([weighted_quantile(row, torch.ones(tokens), 1 - target) for row in said])
    weights = sizes.unsqueeze(1).expand(gates, tokens).flatten()
    return weighted_quantile(said.flatten(), weights, 1 - target).expand(gates).clone()


@contextmanager
def _listening(model: RoutedForCausalLM) -> Iterator[list[torch.Tensor]]:
    """The router logits `[B, T, 1]` of a call of the hard model, gate by gate."""
    heard: list[torch.Tensor] = []
    graph = model.hard_graph()
    routers: Sequence[Any] = list(model.routers.values())
    handles = [
        graph.get_submodule(f"blocks.{name_of(layers)}.decide.score").register_forward_hook(
            lambda _, __, score, bias=router.bias: heard.append(score + bias)
        )
        for layers, router in zip(model.gated_layers, routers, strict=True)
    ]
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()
