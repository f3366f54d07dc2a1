from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from modcompile.config import BudgetConfig, BudgetLoss
from modcompile.objective import Budget, bits_budget, depth_budget, expected_bits
from modcompile.precision_config import PrecisionBudgetConfig

_BITS = [2, 4, 16]
_TOKENS = torch.tensor([[False, True, True, True], [True, True, True, True]])
_WHERE = _TOKENS.nonzero().tolist()


@dataclass
class _Decided:
    """What a budget reads of a model's output: weights of the precisions, gates, and which tokens there are."""

    precision_weights: list[torch.Tensor]
    gates: dict[int, torch.Tensor] | None
    tokens: torch.Tensor


def _random(*shape: int, seed: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=["sequence", "token"])
def decided(request: pytest.FixtureRequest) -> _Decided:
    """Three layers; the second has no gate."""
    tokens = 1 if request.param == "sequence" else 4
    weights = [_random(2, tokens, 3, seed=layer).softmax(-1).requires_grad_() for layer in range(3)]
    gates = {layer: _random(2, 4, 1, seed=9 + layer).requires_grad_() for layer in (0, 2)}
    return _Decided(weights, gates, _TOKENS)


def _bits_of(decided: _Decided, layer: int, row: int, column: int) -> float:
    weights = decided.precision_weights[layer].expand(2, 4, 3)[row, column].tolist()
    gate = 1.0 if decided.gates is None or layer not in decided.gates else decided.gates[layer][row, column, 0].item()
    return gate * sum(weight * bits for weight, bits in zip(weights, _BITS, strict=True))


def test_expected_bits_are_summed_token_by_token(decided: _Decided) -> None:
    expected = [sum(_bits_of(decided, layer, row, column) for row, column in _WHERE) for layer in range(3)]
    torch.testing.assert_close(expected_bits(decided, torch.tensor(_BITS).float()), torch.tensor(expected))


@pytest.mark.parametrize("gates", [None, {}])
def test_without_gates_every_token_counts(decided: _Decided, gates: Any) -> None:
    decided.gates = gates
    decided.precision_weights = [torch.tensor([0.5, 0.5, 0.0]).expand(2, 1, 3)] * 3
    assert expected_bits(decided, torch.tensor(_BITS).float()).tolist() == [3.0 * 7] * 3


def test_closed_gates_have_no_bits_and_padding_counts_nowhere(decided: _Decided) -> None:
    decided.precision_weights = [torch.tensor([0.0, 0.0, 1.0]).expand(2, 1, 3)] * 3
    closed = torch.ones(2, 4, 1)
    closed[0, 0] = closed[0, 1] = closed[1, 2] = 0  # the first of them is padding
    decided.gates = {0: closed, 2: torch.zeros(2, 4, 1)}
    assert expected_bits(decided, torch.tensor(_BITS).float()).tolist() == [16.0 * 5, 16.0 * 7, 0.0]


def test_bits_reach_weights_and_gates_but_not_at_padding(decided: _Decided) -> None:
    bits_budget(PrecisionBudgetConfig(), _BITS).spent(decided).mean().backward()
    assert decided.gates is not None
    for layer, weights in enumerate(decided.precision_weights):
        assert weights.grad is not None
        shape = decided.tokens.unsqueeze(-1).expand(2, 4, 3)
        gate = decided.gates.get(layer, torch.ones(2, 4, 1)).detach()
        by_token = torch.where(shape, gate * torch.tensor(_BITS) / 3, 0.0)
        expected = by_token if weights.shape[1] == 4 else by_token.sum(1, keepdim=True)
        torch.testing.assert_close(weights.grad, expected)
    for gate in decided.gates.values():
        assert gate.grad is not None
        assert ((gate.grad.squeeze(-1) > 0) == decided.tokens).all()


@pytest.mark.parametrize(("target", "charged"), [(None, 6 / 16), (0.0, 6 / 16), (4.5, 1.5 / 16), (6.0, 0.0), (9, 0.0)])
def test_bits_above_the_target_are_charged_as_a_share_of_the_most(target: float | None, charged: float) -> None:
    budget = bits_budget(PrecisionBudgetConfig(precision_weight=3.0, avg_bits_target=target), _BITS)
    assert (budget.name, budget.penalty_name, budget.weight) == ("average_bits", "bits_loss", 3.0)
    assert float(budget.penalty(torch.tensor(6.0))) == pytest.approx(charged)


def test_the_most_bits_are_those_that_can_be_chosen() -> None:
    budget = bits_budget(PrecisionBudgetConfig(), [4, 2])
    assert float(budget.penalty(torch.tensor(4.0))) == 1.0


@pytest.mark.parametrize(("mean", "gradient"), [(5.0, 1 / 16), (3.0, 0.0)])
def test_only_what_is_above_the_target_is_pushed(mean: float, gradient: float) -> None:
    spent = torch.tensor(mean, requires_grad=True)
    bits_budget(PrecisionBudgetConfig(avg_bits_target=4.0), _BITS).penalty(spent).backward()
    assert spent.grad is not None
    assert float(spent.grad) == gradient


def _charged(budget: Budget, output: Any) -> float:
    with torch.no_grad():
        return float(budget.penalty(budget.spent(output) / output.tokens.sum()))


@pytest.mark.parametrize("target", [0.0, 0.3, 0.9])
def test_depth_is_the_share_of_tokens_and_layers_above_its_target(decided: _Decided, target: float) -> None:
    """Models of gates alone have a tuple of them."""
    assert decided.gates is not None
    gates = tuple(decided.gates.values())
    mean = sum(gate[row, column, 0].item() for gate in gates for row, column in _WHERE) / (2 * len(_WHERE))
    assert 0.3 < mean < 0.9
    budget = depth_budget(BudgetConfig(router_lambda=2.0, target_active_ratio=target))
    assert (budget.name, budget.penalty_name, budget.weight) == ("active_ratio", "budget_loss", 2.0)
    for output in (decided, SimpleNamespace(gates=gates, tokens=_TOKENS)):
        assert _charged(budget, output) == pytest.approx(max(mean - target, 0.0))


MEANS = torch.tensor([0.9, 0.6, 0.2])


@pytest.mark.parametrize(
    ("kind", "target", "charged"),
    [
        ("hinge", 0.5, 0.2 / 3),
        ("hinge", 0.6, 0.0),
        ("squared", 0.5, (0.2 / 3) ** 2),
        ("squared", 0.7, (0.4 / 3) ** 2),
        ("per_layer", 0.5, (0.4 + 0.1) / 3),
        ("per_layer", 0.7, 0.2 / 3),
        ("per_layer", 0.9, 0.0),
        ("price", 0.5, 0.9 + 0.6 + 0.2),
        ("price", 1.0, 0.9 + 0.6 + 0.2),
    ],
)
def test_charges_of_each_kind(kind: BudgetLoss, target: float, charged: float) -> None:
    budget = depth_budget(BudgetConfig(target_active_ratio=target, budget_loss=kind))
    assert float(budget.penalty(MEANS)) == pytest.approx(charged, abs=1e-7)


def test_a_price_is_of_work() -> None:
    budget = depth_budget(BudgetConfig(budget_loss="price"), [0.25, 0.75, 1.0])
    assert float(budget.penalty(MEANS)) == pytest.approx(0.25 * 0.9 + 0.75 * 0.6 + 0.2)
    assert float(budget.mean(MEANS)) == pytest.approx((0.25 * 0.9 + 0.75 * 0.6 + 0.2) / 2)


@pytest.mark.parametrize(
    ("progress", "target"), [(0.0, 1.0), (0.1, 0.9), (0.25, 0.75), (0.5, 0.5), (0.75, 0.5), (1.0, 0.5)]
)
def test_the_target_falls_to_where_it_stays(progress: float, target: float) -> None:
    budget = depth_budget(BudgetConfig(target_active_ratio=0.5, target_warmup_ratio=0.5))
    assert budget.target_at(progress) == pytest.approx(target)
    mean = torch.tensor([0.95])
    assert float(budget.penalty(mean, progress)) == pytest.approx(max(0.95 - target, 0))
    assert float(budget.penalty(mean)) == pytest.approx(0.45)


def test_without_a_warm_up_the_target_is_that_from_the_start() -> None:
    assert depth_budget(BudgetConfig(target_active_ratio=0.5)).target_at(0.0) == 0.5


def test_depth_reaches_the_gates(decided: _Decided) -> None:
    depth_budget(BudgetConfig()).spent(decided).mean().backward()
    assert decided.gates is not None
    for gate in decided.gates.values():
        assert gate.grad is not None
        assert torch.equal(gate.grad.squeeze(-1), 0.5 * _TOKENS)
