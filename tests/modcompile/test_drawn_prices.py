from typing import get_args

import pytest
import torch

from modcompile.config import GateKind, RouterConfig
from modcompile.drawn_prices import DrawnPrices
from modcompile.modeling import RoutedForCausalLM
from modcompile.routed_graph import build_routed
from tests.tiny_routed import tiny_base

IDS = torch.arange(3, 43).view(4, 10)
PLACES = torch.tensor([0.1, 0.35, 0.6, 0.85])


def _model(gate: GateKind) -> RoutedForCausalLM:
    torch.manual_seed(0)
    config = RouterConfig(gate=gate, router_hidden_size=0, router_stop=1)
    model = build_routed(tiny_base(), config, use_cache=False)
    (router,) = model.routers.values()
    torch.nn.init.normal_(router.get_parameter("score.down.weight"), std=0.1)
    return model


def _gate(model: RoutedForCausalLM) -> torch.Tensor:
    output = model(IDS, use_cache=False)
    assert output.gates is not None
    gate: torch.Tensor = output.gates[0].detach()
    return gate


def test_factors_are_powers_of_the_spread() -> None:
    factors = DrawnPrices(_model("soft"), 3.0).set(torch.tensor([0.75, 0.0, 0.5, 0.25]))
    torch.testing.assert_close(factors, torch.tensor([3**0.5, 1 / 3, 1.0, 3**-0.5]))


def test_a_gate_opens_where_a_block_is_worth_its_price() -> None:
    model = _model("soft")
    worth = torch.logit(_gate(model)).exp()
    prices = DrawnPrices(model, 2.0)
    model.train()
    factors = prices.set(PLACES)
    torch.testing.assert_close(_gate(model), torch.sigmoid((worth / factors.view(-1, 1, 1)).log()))


@pytest.mark.parametrize("gate", get_args(GateKind))
def test_evaluated_or_stopped_gates_are_what_they_were(gate: GateKind) -> None:
    model = _model(gate)
    before = _gate(model)
    prices = DrawnPrices(model, 100.0)
    prices.set(PLACES)
    assert torch.equal(_gate(model), before)
    torch.manual_seed(1)  # hard concrete gates are noisy in training
    priced = _gate(model.train())
    prices.stop()
    torch.manual_seed(1)
    unpriced = _gate(model)
    assert not torch.equal(unpriced, priced)
    if gate != "hard_concrete":
        assert torch.equal(unpriced, before)
