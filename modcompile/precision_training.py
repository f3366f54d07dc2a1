"""Training of the routers of precisions, and of depth gates beside them, in a quantized folder."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset

from modcompile.artifacts import is_routed_folder, load_depth_routers, read_router_config, save_depth_routers
from modcompile.config import BudgetConfig, RouterConfig
from modcompile.errors import ConfigError
from modcompile.layerwise import LayerwiseQuantizeForCausalLM
from modcompile.objective import Budget, Objective, bits_budget, depth_budget
from modcompile.precision_choices import chosen_bits
from modcompile.precision_config import PrecisionBudgetConfig, PrecisionRouterConfig
from modcompile.precision_router_files import (
    has_precision_routers,
    load_precision_routers,
    read_precision_router_config,
    save_precision_routers,
)
from modcompile.quantized_folder import copy_quantized_folder
from modcompile.router_task import RouterTask
from modcompile.share_of_parameters import describe_share
from modcompile.static_start import start_at_static

TrainedRouters = Literal["both", "depth", "precision"]


@dataclass(frozen=True)
class PrecisionTraining:
    """For `train_routers`: loss = ce_weight * LM loss + precision_weight * bits loss, and the depth budget's.

    The bits loss is max(average bits - avg_bits_target, 0) / the most bits.
    """

    precisions: Sequence[int] | None
    """By default those of the folder's routers, else all that it has."""
    router_options: Mapping[str, Any]
    """Of `PrecisionRouterConfig`: those that are to differ from the folder's routers, or from the defaults."""
    depth: RouterConfig | None
    """Of new depth gates; None keeps those of the folder, if it has some."""
    trained: TrainedRouters
    budget: PrecisionBudgetConfig
    depth_budget: BudgetConfig
    start: Dataset | None = None
    """Sequences by which new routers start from the best static allocation at the target; None: from the most bits."""

    def open(self, folder: Path, device: torch.device) -> RouterTask:
        """The model of a quantized folder.

        It goes on with the folder's routers, if these choose for what is wanted, and know all precisions that are.
        """
        stored, known = PrecisionRouterConfig(), list[int]()
        if has_precision_routers(folder):
            stored, known = read_precision_router_config(folder)
        config = replace(stored, **self.router_options)
        precisions = (known or None) if self.precisions is None else self.precisions
        model = LayerwiseQuantizeForCausalLM.from_quantized(
            folder, precisions, depth=self.depth, device=device, **asdict(config)
        )
        # Mixing and dropout are how routers are trained, not what they are.
        if config.router_scope == stored.router_scope and set(model.precisions) <= set(known):
            load_precision_routers(model.routers, folder, known, model.precisions)
        else:
            if known:
                print(
                    f"the routers in {folder} are not used: they choose {_what_is_chosen(stored, known)}; new ones "
                    f"choose {_what_is_chosen(config, model.precisions)}"
                )
            self._start(model)
        for router in model.routers.values():
            router.requires_grad_(self.trained != "depth")
        for of_depth in (*model.depth_routers.values(), *model.adapters.values()):
            of_depth.requires_grad_(self.trained != "precision")
        return precision_task(model, self.budget, self.depth_budget)

    def _start(self, model: LayerwiseQuantizeForCausalLM) -> None:
        """Let new routers start from the best static allocation, if that is wanted."""
        if self.start is None or self.budget.avg_bits_target is None:
            return
        chosen = start_at_static(model, self.start, self.budget.avg_bits_target)
        print(f"starting from {sum(chosen) / len(chosen):.2f} bits on average, by layer: {' '.join(map(str, chosen))}")

    def copy(self, source: Path, folder: Path, *, overwrite: bool) -> None:
        """Copy what a quantized folder holds."""
        copy_quantized_folder(source, folder, overwrite=overwrite)

    def report(self, task: RouterTask) -> dict[str, Any]:
        """The budgets, and what is chosen from."""
        model = _layerwise(task)
        depth = {"depth_budget": asdict(self.depth_budget)} if model.depth_routers else {}
        return {"precisions": model.precisions, "budget": asdict(self.budget), **depth}


def precision_task(
    model: LayerwiseQuantizeForCausalLM, budget: PrecisionBudgetConfig, depth: BudgetConfig
) -> RouterTask:
    """The training of a model's routers; evaluated is what a row or token chose alone, as it is used."""
    budgets: list[Budget] = [bits_budget(budget, model.precisions)]
    if model.depth_routers:
        budgets.append(depth_budget(depth))
    return RouterTask(
        model,
        partial(model.train_forward, hard=True),
        Objective(tuple(budgets), budget.ce_weight),
        partial(_save, model),
        partial(_load, model),
        _describe(model),
        chosen_bits=partial(chosen_bits, precisions=model.precisions),
    )


def _save(model: LayerwiseQuantizeForCausalLM, folder: Path) -> None:
    if model.depth_config is not None:
        save_depth_routers(model.depth_routers, model.depth_config, folder, model.adapters)
    save_precision_routers(model.routers, model.router_config, model.precisions, folder)


def _load(model: LayerwiseQuantizeForCausalLM, folder: Path) -> None:
    config, precisions = read_precision_router_config(folder)
    depth = read_router_config(folder) if is_routed_folder(folder) else None
    if (config, precisions, depth) != (model.router_config, model.precisions, model.depth_config):
        # Their shapes may be the same.
        raise ConfigError(
            f"{folder} holds other routers than are trained here: of {' '.join(map(str, precisions))} bits, {config}, "
            f"depth gates {depth}; give the flags of its training"
        )
    if model.depth_config is not None:
        load_depth_routers(model.depth_routers, folder, model.adapters)
    load_precision_routers(model.routers, folder, model.precisions, model.precisions)


def _layerwise(task: RouterTask) -> LayerwiseQuantizeForCausalLM:
    assert isinstance(task.model, LayerwiseQuantizeForCausalLM)
    return task.model


def _what_is_chosen(config: PrecisionRouterConfig, precisions: Sequence[int]) -> str:
    return f"for each {config.router_scope} from {', '.join(map(str, precisions))} bits"


def _describe(model: LayerwiseQuantizeForCausalLM) -> str:
    bits = ", ".join(map(str, model.precisions))
    gates = f", {len(model.depth_routers)} of them with a depth gate" if model.depth_routers else ""
    layers = f"{bits} bits in {len(model.routers)} routed layers{gates}"
    return f"{type(model.base).__name__}, {layers}; {describe_share(model)}"
