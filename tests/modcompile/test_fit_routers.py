import math
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch.nn.functional import kl_div

from modcompile.changed_routing import random_gates
from modcompile.config import RouterConfig
from modcompile.fit_routers import fit_routers
from modcompile.modeling import RoutedForCausalLM
from modcompile.perplexity import measure
from modcompile.routed_graph import build_routed
from tests.tiny_routed import tiny_base

TARGET = 0.7


def _blocks(seed: int, rows: int) -> Dataset:
    """Words of few kinds, so that a linear router can learn from some what others cost."""
    ids = torch.randint(3, 43, (rows, 32), generator=torch.Generator().manual_seed(seed))
    columns = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    return Dataset.from_dict({name: tensor.tolist() for name, tensor in columns.items()})


def _model(**options: Any) -> RoutedForCausalLM:
    torch.manual_seed(0)
    defaults: dict[str, Any] = {"router_hidden_size": 0, "skip_adapter": "low_rank", "adapter_rank": 4}
    config = RouterConfig(**(defaults | options))
    return build_routed(tiny_base(), config, use_cache=False)


@torch.no_grad()
def _divergence(model: RoutedForCausalLM, ids: torch.Tensor, threshold: float) -> tuple[float, float]:
    """KL(dense ‖ hard) a token, and the active ratio."""
    model.set_router_mode(threshold)
    model.reset_usage()
    ours = model(ids).logits.log_softmax(-1)
    dense = model.base(ids).logits.log_softmax(-1)
    return float(kl_div(ours, dense, log_target=True, reduction="sum")) / ids.numel(), model.active_ratio


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"skip_adapter": "none"},
        {"skip_adapter": "scale", "layer_norm_router_input": False},
        {"granularity": "attn+mlp", "gates_per_decision": 3},
        {"blocks_per_gate": 2},
    ],
    ids=str,
)
def test_near_the_target_at_half(options: dict[str, Any]) -> None:
    model = _model(**options)
    predicted = fit_routers(model, _blocks(0, 48), TARGET)
    hard = measure(model, _blocks(1, 16), 0.5)
    # What is skipped changes what later routers read.
    assert hard.active_ratio == pytest.approx(TARGET, abs=0.08)
    assert predicted is not None
    assert predicted > 0


@pytest.mark.parametrize("adapter", ["none", "low_rank"])
def test_loses_less_than_skipping_at_random(adapter: str) -> None:
    model = _model(skip_adapter=adapter)
    predicted = fit_routers(model, _blocks(0, 48), TARGET)
    assert predicted is not None
    ids = torch.tensor(_blocks(1, 16)["input_ids"])
    lost, ratio = _divergence(model, ids, 0.5)
    with random_gates(model, seed=0):
        at_random, as_often = _divergence(model, ids, 1 - ratio)
    assert as_often == pytest.approx(ratio, abs=0.03)
    assert lost < 0.6 * at_random
    assert 0.5 < lost / predicted < 2


def test_adapters_that_the_cost_counts_for_lose_less_than_none() -> None:
    ids = torch.tensor(_blocks(1, 16)["input_ids"])
    lost = {}
    for adapter in ("none", "low_rank"):
        model = _model(skip_adapter=adapter)
        fit_routers(model, _blocks(0, 48), TARGET)
        lost[adapter], _ = _divergence(model, ids, 0.5)
    assert lost["low_rank"] < 0.8 * lost["none"]


@pytest.mark.parametrize(("target", "ratio"), [(1.0, 1.0), (0.0, 0.0)])
def test_all_or_nothing(target: float, ratio: float) -> None:
    model = _model()
    fit_routers(model, _blocks(0, 8), target)
    assert all(torch.isfinite(parameter).all() for parameter in model.router_parameters())
    assert measure(model, _blocks(0, 8), 0.5).active_ratio == pytest.approx(ratio, abs=0.02)


def test_opens_where_a_block_is_worth_its_price_in_nats() -> None:
    """Nothing at a price above all costs, where the mean cost is told; near that, routers differ by a constant."""
    models = {factor: _model(skip_adapter="none", router_layers="1") for factor in (1e6, 1.5, 1.0, 0.5)}
    mean, ratios, told = 1.0, {}, {}
    for factor, model in models.items():
        lost = fit_routers(model, _blocks(0, 32), TARGET, price=factor * mean)
        assert lost is not None
        told[factor] = lost
        mean = told[1e6]
        ratios[factor] = measure(model, _blocks(0, 32), 0.5).active_ratio
    assert 0 == ratios[1e6] < ratios[1.5] < ratios[1.0] < ratios[0.5] <= 1
    # What is skipped costs less than its price.
    assert told[1.0] < mean * (1 - ratios[1.0])
    dear, cheap = (models[factor].routers[1].state_dict() for factor in (1.5, 0.5))
    assert float(cheap["bias"] - dear["bias"]) == pytest.approx(math.log(3), abs=1e-4)
    torch.testing.assert_close(cheap["score.down.weight"], dear["score.down.weight"])


@pytest.mark.parametrize("layer_norm", [True, False])
@pytest.mark.parametrize("size", [2, 7])
@torch.no_grad()
def test_with_a_hidden_layer_routers_say_the_same(size: int, *, layer_norm: bool) -> None:
    blocks = _blocks(0, 8)
    linear, hidden = (_model(router_hidden_size=each, layer_norm_router_input=layer_norm) for each in (0, size))
    for model in (linear, hidden):
        fit_routers(model, blocks, TARGET)
    states = torch.randn(3, 5, linear.config.hidden_size, generator=torch.Generator().manual_seed(0))
    for mine, other in zip(linear.routers.values(), hidden.routers.values(), strict=True):
        assert mine(states).std() > 0.01
        torch.testing.assert_close(other(states), mine(states), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [2, 7])
def test_all_of_a_hidden_layer_is_trained(size: int) -> None:
    model = _model(router_hidden_size=size)
    fit_routers(model, _blocks(0, 8), TARGET)
    router = model.routers[0]
    router(torch.randn(4, model.config.hidden_size, generator=torch.Generator().manual_seed(0))).sum().backward()
    gradient = router.get_parameter("score.down.weight").grad
    assert gradient is not None
    assert (gradient != 0).all()


def test_the_same_twice() -> None:
    first, second = _model(), _model()
    for model in (first, second):
        fit_routers(model, _blocks(0, 8), TARGET, batch_size=3)
    for mine, other in zip(first.router_parameters(), second.router_parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=0)


def test_what_has_been_fitted_stays() -> None:
    model = _model()
    fit_routers(model, _blocks(0, 8), TARGET)
    before = [parameter.clone() for parameter in model.router_parameters()]
    assert fit_routers(model, _blocks(1, 8), 0.3) is None
    for parameter, earlier in zip(model.router_parameters(), before, strict=True):
        assert parameter.equal(earlier)
