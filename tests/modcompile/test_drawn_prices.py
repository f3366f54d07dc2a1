import math
from typing import get_args

import pytest
import torch

from modcompile.config import GateKind, RouterConfig
from modcompile.drawn_prices import DrawnPrices
from modcompile.modeling import RoutedForCausalLM
from modcompile.routed_graph import build_routed
from tests.tiny_routed import tiny_base

IDS = torch.arange(3, 43).view(4, 10)


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


@pytest.mark.parametrize("batch_size", [1, 4, 7])
def test_factors_are_spread_evenly_between_their_bounds(batch_size: int) -> None:
    torch.manual_seed(0)
    prices = DrawnPrices(_model("soft"), 3.0)
    drawn = torch.stack([prices.draw(batch_size) for _ in range(400)]).log() / math.log(3)
    assert drawn.shape == (400, batch_size)
    assert drawn.abs().max() <= 1
    gaps = drawn.sort(1).values.diff(dim=1)
    torch.testing.assert_close(gaps, torch.full_like(gaps, 2 / batch_size), rtol=0, atol=1e-5)
    # Over many batches, every place alike: mean and variance are those of a uniform distribution.
    assert float(drawn.mean()) == pytest.approx(0, abs=0.1)
    assert float(drawn.square().mean()) == pytest.approx(1 / 3, abs=0.05)


def test_a_gate_opens_where_a_block_is_worth_its_price() -> None:
    model = _model("soft")
    worth = torch.logit(_gate(model)).exp()
    prices = DrawnPrices(model, 2.0)
    model.train()
    factors = prices.draw(len(IDS))
    assert factors.unique().numel() == len(IDS)
    torch.testing.assert_close(_gate(model), torch.sigmoid((worth / factors.view(-1, 1, 1)).log()))


@pytest.mark.parametrize("gate", get_args(GateKind))
def test_evaluated_or_stopped_gates_are_what_they_were(gate: GateKind) -> None:
    model = _model(gate)
    before = _gate(model)
    prices = DrawnPrices(model, 100.0)
    prices.draw(len(IDS))
    assert torch.equal(_gate(model), before)
    torch.manual_seed(1)  # hard concrete gates are noisy in training
    priced = _gate(model.train())
    prices.stop()
    torch.manual_seed(1)
    unpriced = _gate(model)
    assert not torch.equal(unpriced, priced)
    if gate != "hard_concrete":
        assert torch.equal(unpriced, before)
