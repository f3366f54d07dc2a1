from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from modcompile.artifacts import update_report
from modcompile.config import BudgetConfig
from modcompile.depth_training import DepthTraining
from modcompile.errors import ArtifactError
from modcompile.loss_config import LossConfig
from modcompile.modeling import RoutedForCausalLM
from modcompile.router_task import RouterTask
from tests.folder_contents import contents

_TRAINING = DepthTraining(BudgetConfig(router_lambda=2.0, target_active_ratio=0.4), LossConfig())


@pytest.fixture(scope="module")
def task(routed_folder: Path) -> RouterTask:
    return _TRAINING.open(routed_folder, torch.device("cpu"))


def _routers(task: RouterTask) -> dict[int, dict[str, torch.Tensor]]:
    assert isinstance(task.model, RoutedForCausalLM)
    return {
        layer: {name: tensor.clone() for name, tensor in router.state_dict().items()}
        for layer, router in task.model.routers.items()
    }


def test_opens_the_soft_model_and_evaluates_it(task: RouterTask) -> None:
    assert isinstance(task.model, RoutedForCausalLM)
    assert task.model.hard_thresholds is None
    assert not task.model.takes_cache
    assert task.evaluated is task.model
    assert task.description == "LlamaForCausalLM, 2 routed layers; trainable: 658 of 43,122 parameters (1.526%)"


def test_what_is_trained_for_is_the_budget(task: RouterTask) -> None:
    assert task.objective.lm_weight == 1.0
    (budget,) = task.objective.budgets
    assert (budget.name, budget.weight, budget.target) == ("active_ratio", 2.0, 0.4)
    assert _TRAINING.report(task) == {
        "budget": {
            "router_lambda": 2.0,
            "target_active_ratio": 0.4,
            "budget_loss": "hinge",
            "target_warmup_ratio": 0.0,
            "price_spread": 1.0,
        },
        "loss": {"lm_weight": 1.0, "distill_weight": 0.0, "gate_temperature": 1.0, "gate_gradient": "first_order"},
    }


def test_what_is_saved_is_read_back(task: RouterTask, routed_folder: Path, tmp_path: Path) -> None:
    before = _routers(task)
    task.save(tmp_path)
    assert contents(tmp_path) == {
        name: contents(routed_folder)[name] for name in ("routers.safetensors", "router_config.json")
    }
    for parameter in task.model.parameters():
        if parameter.requires_grad:
            torch.nn.init.zeros_(parameter)
    task.load(tmp_path)
    torch.testing.assert_close(_routers(task), before, rtol=0, atol=0)
    assert len(load_file(tmp_path / "routers.safetensors")) == sum(map(len, before.values()))
    with pytest.raises(ArtifactError, match=r"routers\.safetensors can't be read"):
        task.load(tmp_path / "nowhere")


def test_copies_a_folder_as_it_was_rewritten(routed_folder: Path, tmp_path: Path) -> None:
    _TRAINING.copy(routed_folder, tmp_path / "a", overwrite=False)
    assert contents(tmp_path / "a") == contents(routed_folder)
    update_report(tmp_path / "a", "training", {"steps": 3})
    _TRAINING.copy(tmp_path / "a", tmp_path / "b", overwrite=False)
    assert contents(tmp_path / "b") == contents(routed_folder)
