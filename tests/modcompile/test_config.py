import math
from dataclasses import fields
from typing import Any

import pytest

from modcompile.config import BudgetConfig, RouterConfig, check_threshold
from modcompile.errors import ConfigError
from modcompile.loss_config import LossConfig
from modcompile.start_config import StartConfig


@pytest.mark.parametrize(
    ("config", "field", "value"),
    [
        (RouterConfig, "router_hidden_size", -1),
        (RouterConfig, "blocks_per_gate", 0),
        (RouterConfig, "gates_per_decision", 0),
        (RouterConfig, "router_dropout", -0.1),
        (RouterConfig, "router_dropout", 1.0),
        (RouterConfig, "router_dropout", math.nan),
        (RouterConfig, "router_pattern", "some"),
        (RouterConfig, "router_start", -1),
        (RouterConfig, "lock_first_layers", -1),
        (RouterConfig, "lock_last_layers", -1),
        (RouterConfig, "gate", "hard"),
        (RouterConfig, "skip_adapter", "mlp"),
        (RouterConfig, "adapter_rank", 0),
        (RouterConfig, "router_init_bias", 0.0),
        (RouterConfig, "router_init_bias", -1.0),
        (RouterConfig, "router_init_bias", math.nan),
        (BudgetConfig, "router_lambda", -0.01),
        (BudgetConfig, "router_lambda", math.nan),
        (BudgetConfig, "router_lambda", math.inf),
        (BudgetConfig, "target_active_ratio", -0.1),
        (BudgetConfig, "target_active_ratio", 1.1),
        (BudgetConfig, "target_active_ratio", math.nan),
        (BudgetConfig, "budget_loss", "cubed"),
        (BudgetConfig, "target_warmup_ratio", -0.1),
        (BudgetConfig, "target_warmup_ratio", 1.1),
        (BudgetConfig, "price_spread", 0.5),
        (LossConfig, "lm_weight", -1.0),
        (LossConfig, "distill_weight", math.inf),
        (StartConfig, "adapter_start_samples", -1),
        (LossConfig, "gate_gradient", "third_order"),
        (LossConfig, "gate_temperature", 0),
        (LossConfig, "gate_temperature", 1.5),
        (StartConfig, "router_start_samples", -1),
        (StartConfig, "static_selection_samples", -1),
    ],
)
def test_refuses_a_value_outside_of_its_range_and_names_the_flag(
    config: type[RouterConfig | BudgetConfig | LossConfig | StartConfig], field: str, value: Any
) -> None:
    with pytest.raises(ConfigError, match=f"^--{field} is "):
        config(**{field: value})


def test_a_price_is_above_zero_and_only_prices_spread() -> None:
    with pytest.raises(ConfigError, match=r"^--router_lambda is 0; it must be a number, above 0$"):
        BudgetConfig(budget_loss="price", router_lambda=0)
    with pytest.raises(ConfigError, match=r"^--price_spread is of prices; add --budget_loss price$"):
        BudgetConfig(budget_loss="squared", price_spread=2)
    assert BudgetConfig(budget_loss="price", price_spread=2).price_spread == 2


@pytest.mark.parametrize(
    ("config", "field", "value"),
    [
        (RouterConfig, "router_hidden_size", 0),
        (RouterConfig, "blocks_per_gate", 1),
        (RouterConfig, "gates_per_decision", 1),
        (RouterConfig, "router_dropout", 0.999),
        (RouterConfig, "adapter_rank", 1),
        (RouterConfig, "router_init_bias", 1e-3),
        (BudgetConfig, "router_lambda", 0.0),
        (BudgetConfig, "target_active_ratio", 0.0),
        (BudgetConfig, "target_active_ratio", 1.0),
    ],
)
def test_takes_the_ends_of_a_range(
    config: type[RouterConfig | BudgetConfig | LossConfig | StartConfig], field: str, value: Any
) -> None:
    assert getattr(config(**{field: value}), field) == value


def test_refuses_to_learn_from_nothing() -> None:
    with pytest.raises(ConfigError, match=r"^--lm_weight and --distill_weight are both 0: "):
        LossConfig(lm_weight=0.0)
    assert LossConfig(lm_weight=0.0, distill_weight=1e-3).lm_weight == 0.0


@pytest.mark.parametrize("config", [RouterConfig, BudgetConfig, LossConfig, StartConfig])
def test_every_option_says_what_it_is(config: type[RouterConfig | BudgetConfig | LossConfig | StartConfig]) -> None:
    assert all(option.metadata["help"] for option in fields(config))


@pytest.mark.parametrize(("gate", "bias"), [("soft", 4.0), ("straight_through", 0.2), ("hard_concrete", 3.0)])
def test_initial_bias_depends_on_the_gate_unless_it_is_given(gate: Any, bias: float) -> None:
    assert RouterConfig(gate=gate).init_bias == bias
    assert RouterConfig(gate=gate, router_init_bias=2.0).init_bias == 2.0


@pytest.mark.parametrize(
    ("options", "layers"),
    [
        ({}, [0, 1, 2, 3, 4, 5]),
        ({"router_pattern": "every_other"}, [0, 2, 4]),
        ({"router_start": 1, "router_pattern": "every_other"}, [1, 3, 5]),
        ({"router_start": 2, "router_stop": 5}, [2, 3, 4]),
        ({"router_start": 5}, [5]),
        ({"router_stop": 1}, [0]),
        ({"lock_first_layers": 2, "lock_last_layers": 1}, [2, 3, 4]),
        # A lock takes layers away, and does not move the pattern.
        ({"router_pattern": "every_other", "lock_first_layers": 1}, [2, 4]),
        ({"router_start": 1, "router_stop": 5, "lock_first_layers": 3}, [3, 4]),
        ({"router_layers": "1-3,5"}, [1, 2, 3, 5]),
        ({"router_layers": "5,0-1,1"}, [0, 1, 5]),
        ({"router_layers": "0-3", "lock_first_layers": 1, "router_pattern": "every_other"}, [2]),
    ],
)
def test_routed_layers(options: dict[str, Any], layers: list[int]) -> None:
    assert RouterConfig(**options).routed_layers(6) == layers


@pytest.mark.parametrize(
    ("options", "gates"),
    [
        ({}, [[0], [1], [2], [3], [4], [5]]),
        ({"router_pattern": "every_other"}, [[0], [2], [4]]),
        ({"blocks_per_gate": 2}, [[0, 1], [2, 3], [4, 5]]),
        ({"blocks_per_gate": 4}, [[0, 1, 2, 3], [4, 5]]),
        ({"blocks_per_gate": 9}, [[0, 1, 2, 3, 4, 5]]),
        ({"blocks_per_gate": 3, "lock_first_layers": 1, "lock_last_layers": 1}, [[1, 2, 3], [4]]),
        ({"blocks_per_gate": 2, "router_start": 2, "router_stop": 5}, [[2, 3], [4]]),
        ({"blocks_per_gate": 2, "router_layers": "0-2,4-5"}, [[0, 1], [2], [4, 5]]),
    ],
)
def test_gates_take_consecutive_layers_and_the_last_what_is_left(
    options: dict[str, Any], gates: list[list[int]]
) -> None:
    assert [list(layers) for layers in RouterConfig(**options).gated_layers(6)] == gates


def test_refuses_one_gate_for_layers_that_are_not_consecutive() -> None:
    with pytest.raises(ConfigError, match=r"^--blocks_per_gate 2 is for consecutive layers, .* leave one of them out$"):
        RouterConfig(blocks_per_gate=2, router_pattern="every_other")


@pytest.mark.parametrize(
    "options",
    [
        {"router_start": 6},
        {"router_start": 3, "router_stop": 3},
        {"router_start": 4, "router_stop": 2},
        {"router_stop": 7},
        {"router_stop": 0},
        {"router_stop": -1},
    ],
)
def test_refuses_a_range_outside_of_the_model(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"--router_start .* --router_stop .* it has 6, so 0 <= start < stop <= 6"):
        RouterConfig(**options).routed_layers(6)


@pytest.mark.parametrize("names", ["", "a", "3-1", "1,", "1;2", "-1"])
def test_refuses_what_is_no_list_of_layers(names: str) -> None:
    with pytest.raises(ConfigError, match=r"^--router_layers is .*; it must be a list of layers such as 2-10,12$"):
        RouterConfig(router_layers=names)


def test_refuses_layers_that_the_model_does_not_have() -> None:
    with pytest.raises(ConfigError, match=r"^--router_layers 4-7 names layer 6, but this model has the layers 0 to 5$"):
        RouterConfig(router_layers="4-7").routed_layers(6)


@pytest.mark.parametrize(
    "options",
    [
        {"lock_first_layers": 6},
        {"router_layers": "0", "router_start": 1},
        {"lock_first_layers": 3, "lock_last_layers": 3},
        {"router_stop": 2, "lock_first_layers": 2},
        {"router_start": 4, "lock_last_layers": 2},
        {"lock_first_layers": 100},
    ],
)
def test_refuses_to_route_nothing(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"no layer is left to route.* widen the range or lock fewer"):
        RouterConfig(**options).routed_layers(6)


@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf, -math.inf])
def test_refuses_a_threshold_that_is_none(value: float) -> None:
    with pytest.raises(ConfigError, match=r"^--hard_threshold is "):
        check_threshold(value)


@pytest.mark.parametrize("value", [0, 0.5, 1, 2.5])
def test_takes_any_other_threshold(value: float) -> None:
    threshold = check_threshold(value)
    assert threshold == value
    assert isinstance(threshold, float)
