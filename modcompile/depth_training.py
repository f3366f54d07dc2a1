"""Training of depth gates, in a routed folder."""

from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from modcompile.artifacts import copy_routed_folder, load_routers, load_with_routers, save_routers
from modcompile.config import BudgetConfig
from modcompile.distillation import dense_logits
from modcompile.drawn_prices import DrawnPrices
from modcompile.fit_adapters import fit_adapters
from modcompile.fit_routers import fit_routers
from modcompile.gate_curvature import GateCurvature
from modcompile.gate_temperature import GateTemperature
from modcompile.loss_config import LossConfig
from modcompile.modeling import RoutedForCausalLM
from modcompile.objective import Objective, depth_budget
from modcompile.rewriting import describe
from modcompile.router_task import RouterTask
from modcompile.start_config import StartConfig
from modcompile.static_routers import close_statically, freeze_routers


@dataclass(frozen=True)
class Start:
    """The texts that things are fitted on before a training; None leaves them as they are."""

    adapters: Dataset | None = None
    """New ones."""
    routers: Dataset | None = None
    """With new adapters."""
    selection: Dataset | None = None
    """Of gates that are closed for all tokens, once adapters are fitted."""
    is_static: bool = False
    """Whether routers stay as they are."""


@dataclass(frozen=True)
class DepthTraining:
    """For `train_routers`: the loss of `depth_task`."""

    budget: BudgetConfig
    loss: LossConfig
    start: Start = Start()

    def open(self, folder: Path, device: torch.device) -> RouterTask:
        """The soft model of a routed folder."""
        model = load_with_routers(folder, None, device=device, use_cache=False)
        if self.start.routers is not None:
            price = self.budget.router_lambda if self.budget.budget_loss == "price" else None
            fit_routers(model, self.start.routers, self.budget.target_active_ratio, price=price)
        elif self.start.adapters is not None:
            fit_adapters(model, self.start.adapters)
        if self.start.selection is not None:
            close_statically(model, self.start.selection, self.budget.target_active_ratio)
        if self.start.is_static:
            freeze_routers(model)
        return depth_task(model, self.budget, self.loss)

    def copy(self, source: Path, folder: Path, *, overwrite: bool) -> None:
        """Copy what a routed folder holds."""
        copy_routed_folder(source, folder, overwrite=overwrite)

    def report(self, task: RouterTask) -> dict[str, Any]:
        """The budget, and what is learned from."""
        return {"budget": asdict(self.budget), "loss": asdict(self.loss)}


def start_rows(blocks: Dataset, config: StartConfig) -> Start:
    """What a training is to start from: rows that lie evenly spread over the training data."""
    return Start(
        _spread(blocks, config.adapter_start_samples),
        _spread(blocks, config.router_start_samples),
        _spread(blocks, config.static_selection_samples),
        is_static=bool(config.static_selection_samples),
    )


def _spread(blocks: Dataset, most: int) -> Dataset | None:
    count = min(most, blocks.num_rows)
    return blocks.select([index * blocks.num_rows // count for index in range(count)]) if count else None


def depth_task(model: RoutedForCausalLM, budget: BudgetConfig, loss: LossConfig) -> RouterTask:
    """The training of a model's depth gates; evaluated is what is trained, soft.

    loss = lm_weight * LM loss + distill_weight * KL(dense, routed) + router_lambda * budget loss (`Budget`)
    """
    objective = Objective((depth_budget(budget, list(model.work.values())),), loss.lm_weight, loss.distill_weight)
    save, load = partial(save_routers, model), partial(load_routers, model)
    dense = partial(dense_logits, model.base)
    routers = [parameter for router in model.routers.values() for parameter in router.parameters()]
    task = RouterTask(model, model, objective, save, load, describe(model), routers, dense_logits=dense)
    if budget.price_spread != 1:
        prices = DrawnPrices(model, budget.price_spread)
        task = replace(task, set_prices=prices.set, finish=(prices.stop,))
    if loss.gate_gradient == "second_order":
        curvature = GateCurvature(model)
        task = replace(task, gate_correction=curvature.correction, finish=(*task.finish, curvature.stop))
    if loss.gate_temperature != 1:
        temperature = GateTemperature(model, loss.gate_temperature)
        finish = (*task.finish, temperature.move_into_routers)
        task = replace(task, set_progress=temperature.set_progress, finish=finish)
    return task
