from pathlib import Path
from typing import Any

import pytest

from modcompile.config import BudgetConfig, RouterConfig
from modcompile.depth_flags import check_training, check_untrained
from modcompile.errors import ConfigError
from modcompile.loss_config import LossConfig
from modcompile.start_config import StartConfig
from modcompile.training_arguments import RouterTrainingArguments

_SOFT = RouterConfig(gate="soft")
_NOTHING = (BudgetConfig(), LossConfig(), StartConfig())


def _arguments(folder: Path, **given: Any) -> RouterTrainingArguments:
    return RouterTrainingArguments(output_dir=str(folder), **given)


@pytest.mark.parametrize("is_best", [False, True])
def test_gates_of_the_best_step_have_the_temperature_of_the_end(tmp_path: Path, is_best: bool) -> None:
    strategy = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 1, "save_steps": 1}
    training = _arguments(tmp_path, load_best_model_at_end=is_best, **strategy)
    check_training(_SOFT, LossConfig(), StartConfig(), training)
    if not is_best:
        check_training(_SOFT, LossConfig(gate_temperature=0.5), StartConfig(), training)
        return
    with pytest.raises(ConfigError, match="--load_best_model_at_end goes back to gates of another temperature"):
        check_training(_SOFT, LossConfig(gate_temperature=0.5), StartConfig(), training)


def test_refuses_starts_and_gradients_that_do_not_fit(tmp_path: Path) -> None:
    training = _arguments(tmp_path)
    with pytest.raises(ConfigError, match="--router_start_samples needs routers that can say anything linear"):
        check_training(RouterConfig(router_hidden_size=1), LossConfig(), StartConfig(router_start_samples=1), training)
    with pytest.raises(ConfigError, match="--gate is soft; make it straight_through"):
        check_training(_SOFT, LossConfig(gate_gradient="second_order"), StartConfig(), training)


@pytest.mark.parametrize(
    ("flag", "configs"),
    [
        ("target_active_ratio", (BudgetConfig(target_active_ratio=0.5), *_NOTHING[1:])),
        ("gate_gradient", (BudgetConfig(), LossConfig(gate_gradient="second_order"), StartConfig())),
        ("adapter_start_samples", (*_NOTHING[:2], StartConfig(adapter_start_samples=1))),
    ],
)
def test_what_is_of_a_training_asks_for_one(
    tmp_path: Path, flag: str, configs: tuple[BudgetConfig, LossConfig, StartConfig]
) -> None:
    check_untrained(*_NOTHING, _arguments(tmp_path))
    with pytest.raises(ConfigError, match=f"^--{flag} asks for a training, but there is no data; add, say, "):
        check_untrained(*configs, _arguments(tmp_path))


def test_so_do_steps(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^--max_train_steps asks for a training"):
        check_untrained(*_NOTHING, _arguments(tmp_path, max_train_steps=1))
