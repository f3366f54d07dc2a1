"""Let routers begin as predictions of what it costs to skip, and adapters as what makes that cost least.

In turn: adapters are fitted (`fit_adapters`), with errors weighed as they cost; what each token then costs at each gate
is estimated (`skip_costs`); routers are fitted to the logarithm of that, by ridge regression; and the tokens
that would then be skipped at the target are those that adapters are fitted for the next time. Costs spread over orders
of magnitude, so that their logarithm is what a linear map can predict; a line through the means of tokens that are
thought alike then turns predictions into costs that are right on average.

A gate's bias is such that it opens where the cost for the work is above that of the last token that is skipped, so a
threshold of 0.5 is near the target, and other thresholds are other budgets.
"""

import math
from typing import Any

import torch
from datasets import Dataset
from torch import nn

from modcompile.fit_adapters import AdapterSums, new_adapters, token_size
from modcompile.modeling import RoutedForCausalLM
from modcompile.routers import DepthScore, LinearScore
from modcompile.skip_costs import DenseTrace, trace_dense
from modcompile.weighted_quantile import weighted_quantile

_ROUNDS = 2
"""Of adapters and routers: only after the first is it known which tokens adapters are for."""
_LEAST_COST = 1e-5  # in nats; below it, costs are all the same
_RIDGE = 200.0  # tokens' worth: features are normalised
_NUM_GROUPS = 12  # of tokens that are thought alike
_LEAST_WEIGHT = 0.02  # of a token that is surely executed
_SHARPNESS = 2.0  # by how much a factor of e in cost tells apart what is skipped and what is not


@torch.no_grad()
def fit_routers(
    model: RoutedForCausalLM,
    blocks: Dataset,
    target: float,
    *,
    price: float | None = None,
    batch_size: int = 4,
    seed: int = 0,
) -> float | None:
    """Fit the new routers of a soft model, and its new adapters, on `blocks`, as `tokenize_and_pack` makes them.

    `target` is the share of the work that is to be done at a threshold of 0.5; unless there is a `price`: then a token
    goes through a block there if it is worth that many nats, whatever share that makes. Returns what is thought to be
    lost there, in nats a token, if what is skipped at one layer made no difference at others; None where routers have
    been fitted or trained already, and all stays as it is.
    """
    routers: list[Any] = list(model.routers.values())
    if any(router.score.down.weight.any() for router in routers):
        return None
    trace = trace_dense(model.base, model.router_config.granularity, blocks, batch_size=batch_size, seed=seed)
    return _fit(model, trace, target, price)


def _fit(model: RoutedForCausalLM, trace: DenseTrace, target: float, price: float | None) -> float:
    adapters = new_adapters(model)
    gates = model.gated_layers
    work = torch.tensor([sum(model.work[layer] for layer in layers) for layers in gates], device=model.device)
    weights: list[torch.Tensor | None] = [None] * len(gates)
    costs = prices = torch.zeros(0)
    for _ in range(_ROUNDS if adapters else 1):
        for layers, of_tokens in zip(gates, weights, strict=True):
            for layer in layers:
                if layer in adapters:
                    before = trace.states[layer]
                    sums = AdapterSums(before.shape[1], model.device)
                    sums.add(before, trace.states[layer + 1], of_tokens)
                    sums.fit(adapters[layer], trace.metric(layer, token_size(before)))
        costs = torch.stack([trace.costs(layers[-1], _skipped(model, trace, layers)) for layers in gates])
        routers = [_fitted(model, trace, gate, costs[gate]) for gate in range(len(gates))]
        prices = torch.stack([score for score, _ in routers]) - work.log().unsqueeze(1)
        share = work.unsqueeze(1).expand_as(prices).flatten()
        limit = weighted_quantile(prices.flatten(), share, 1 - target).clamp(prices.min() - 1, prices.max() + 1)
        if price is not None:
            limit = torch.full_like(limit, math.log(price))
        weights = list(torch.sigmoid((limit - prices) * _SHARPNESS).float() + _LEAST_WEIGHT)
    fitted: list[Any] = list(model.routers.values())
    for router, (_, bias), done in zip(fitted, routers, work, strict=True):
        router.bias.copy_(bias - done.log() - limit)
    skipped = costs[prices <= limit].sum() / costs.shape[1]
    return float(skipped)


def _skipped(model: RoutedForCausalLM, trace: DenseTrace, layers: range) -> torch.Tensor:
    """`[N, H]`: what tokens that skip these layers have behind them."""
    hidden = trace.states[layers.start]
    for layer in layers:
        adapter = model.adapters.get(layer)
        hidden = hidden if adapter is None else adapter(hidden.to(model.dtype)).float()
    return hidden


def _fitted(
    model: RoutedForCausalLM, trace: DenseTrace, gate: int, costs: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fit the score of a router; returns the predicted logarithms of `costs [N]`, and the bias that they include."""
    gates, together = model.gated_layers, model.router_config.gates_per_decision
    router = model.routers[gates[gate].start]
    score = router.score
    assert isinstance(score, LinearScore | DepthScore)
    norm: nn.Module = score.norm
    read = norm(trace.states[gates[gate // together * together].start].to(model.dtype)).float()
    wanted = (costs + _LEAST_COST).log()
    mean = wanted.mean()
    center = read.mean(0)
    features = (read - center).double()
    eye = torch.eye(features.shape[1], dtype=torch.float64, device=features.device)
    weight = torch.linalg.solve(features.T @ features + _RIDGE * eye, features.T @ (wanted - mean).double()).float()
    slope, intercept = _line(read @ weight, costs)
    _say(score, slope * weight)
    return slope * (read @ weight) + intercept, intercept


def _say(score: LinearScore | DepthScore, weight: torch.Tensor) -> None:
    """Let a score be `weight [H]` times what its norm makes of a hidden state.

    Two features of a hidden layer are enough for that, as x = silu(x) - silu(-x). The others keep their random weights
    and count for nothing until they are trained.
    """
    if isinstance(score, LinearScore):
        score.down.weight.copy_(weight)
        return
    score.up.weight[:2] = torch.stack([weight, -weight])
    if score.up.bias is not None:
        score.up.bias[:2] = 0
    score.down.weight.zero_()
    score.down.weight[0, :2] = score.down.weight.new_tensor([1, -1])


def _line(predicted: torch.Tensor, costs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Slope and intercept from predictions to the logarithm of the mean cost of tokens with such predictions."""
    groups = predicted.argsort().tensor_split(_NUM_GROUPS)
    x = torch.stack([predicted[group].mean() for group in groups if len(group)])
    y = torch.stack([(costs[group].mean() + _LEAST_COST).log() for group in groups if len(group)])
    spread = (x - x.mean()).square().sum()
    slope = ((x - x.mean()) * (y - y.mean())).sum() / spread if spread > 0 else torch.ones_like(spread)
    return slope, y.mean() - slope * x.mean()
