import pytest
import torch

from modcompile.config import GateKind, RouterConfig
from modcompile.gate_temperature import GateTemperature
from modcompile.modeling import RoutedForCausalLM
from modcompile.routed_graph import build_routed
from tests.tiny_routed import tiny_base

IDS = torch.arange(3, 23).view(2, 10)


def _model(gate: GateKind, *, router_hidden_size: int = 8) -> RoutedForCausalLM:
    torch.manual_seed(0)
    config = RouterConfig(gate=gate, router_hidden_size=router_hidden_size, blocks_per_gate=2)
    model = build_routed(tiny_base(), config, use_cache=False)
    for router in model.routers.values():
        torch.nn.init.normal_(router.get_parameter("score.down.weight"), std=1.0 if router_hidden_size else 0.1)
        torch.nn.init.constant_(router.get_parameter("bias"), 0.1)
    return model


@torch.no_grad()
def _first_gate(model: RoutedForCausalLM) -> torch.Tensor:
    output = model(IDS, use_cache=False)
    assert output.gates is not None
    gate: torch.Tensor = output.gates[0]
    return gate


@pytest.mark.parametrize("router_hidden_size", [8, 0])
@pytest.mark.parametrize(("progress", "expected"), [(0.0, 1.0), (0.5, 0.5), (1.0, 0.25)])
def test_divides_what_routers_say(progress: float, expected: float, router_hidden_size: int) -> None:
    model = _model("soft", router_hidden_size=router_hidden_size)
    before = _first_gate(model)
    assert 0.05 < before.min() < 0.5 < before.max() < 0.95
    temperature = GateTemperature(model, 0.25)
    temperature.set_progress(progress)
    torch.testing.assert_close(_first_gate(model), torch.sigmoid(torch.logit(before) / expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize("router_hidden_size", [8, 0])
@pytest.mark.parametrize("gate", ["soft", "straight_through", "hard_concrete"])
def test_gates_stay_what_they_are_when_it_becomes_part_of_the_routers(gate: GateKind, router_hidden_size: int) -> None:
    model = _model(gate, router_hidden_size=router_hidden_size)
    temperature = GateTemperature(model, 0.25)
    temperature.set_progress(1.0)
    before = _first_gate(model)
    temperature.move_into_routers()
    torch.testing.assert_close(_first_gate(model), before, rtol=0, atol=1e-5)
    temperature.set_progress(1.0)
    torch.testing.assert_close(_first_gate(model), before, rtol=0, atol=1e-5)


def test_what_is_hard_at_a_half_stays_so() -> None:
    model = _model("soft")
    model.set_router_mode(0.5)
    before = _first_gate(model)
    assert 0 < before.float().mean() < 1
    GateTemperature(model, 0.1).move_into_routers()
    assert torch.equal(_first_gate(model), before)
