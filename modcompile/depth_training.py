"""Training of depth gates, in a routed folder."""

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from modcompile.artifacts import copy_routed_folder, load_routers, load_with_routers, save_routers
from modcompile.config import BudgetConfig, LossConfig
from modcompile.distillation import dense_logits
from modcompile.modeling import RoutedForCausalLM
from modcompile.objective import Objective, depth_budget
from modcompile.rewriting import describe
from modcompile.router_task import RouterTask


@dataclass(frozen=True)
class DepthTraining:
    """For `train_routers`: the loss of `depth_task`."""

    budget: BudgetConfig
    loss: LossConfig

    def open(self, folder: Path, device: torch.device) -> RouterTask:
        """The soft model of a routed folder."""
        return depth_task(load_with_routers(folder, None, device=device, use_cache=False), self.budget, self.loss)

    def copy(self, source: Path, folder: Path, *, overwrite: bool) -> None:
        """Copy what a routed folder holds."""
        copy_routed_folder(source, folder, overwrite=overwrite)

    def report(self, task: RouterTask) -> dict[str, Any]:
        """The budget, and what is learned from."""
        return {"budget": asdict(self.budget), "loss": asdict(self.loss)}


def depth_task(model: RoutedForCausalLM, budget: BudgetConfig, loss: LossConfig) -> RouterTask:
    """The training of a model's depth gates; evaluated is what is trained, soft.

    loss = lm_weight * LM loss + distill_weight * KL + router_lambda * max(active_ratio - target_active_ratio, 0)
    """
    objective = Objective((depth_budget(budget),), loss.lm_weight, loss.distill_weight)
    save, load = partial(save_routers, model), partial(load_routers, model)
    return RouterTask(model, model, objective, save, load, describe(model), partial(dense_logits, model.base))
