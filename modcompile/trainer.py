"""The HF Trainer on a routed graph: the loss, its metrics, and checkpoints that hold the routers only."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from modcompile.artifacts import load_routers, save_routers
from modcompile.config import BudgetConfig
from modcompile.modeling import RoutedCausalLMOutput, RoutedForCausalLM
from modcompile.usage import active_tokens


class RouterTrainer(Trainer):
    """Trains the routers of a `RoutedForCausalLM`.

    loss = LM loss + router_lambda * max(active_ratio - target_active_ratio, 0), with the active ratio the mean of the
    gates over routed layers and tokens that are not padding. It is the same in training and in evaluation.
    """

    def __init__(self, model: RoutedForCausalLM, budget: BudgetConfig, **kwargs: Any) -> None:
        super().__init__(model=model, **kwargs)
        self._routed = model
        self._budget = budget
        self._sums = _MetricSums()
        self._eval_sums = _MetricSums()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """LM loss plus budget loss of one batch; over accumulated batches, the mean of their budget losses."""
        output: RoutedCausalLMOutput = model(**inputs, num_items_in_batch=num_items_in_batch)
        assert output.loss is not None and output.gates is not None and output.tokens is not None
        ratio = active_tokens(output.gates, output.tokens).mean() / output.tokens.sum()
        budget_loss = (ratio - self._budget.target_active_ratio).clamp(min=0)
        accumulated = 1
        if model.training and num_items_in_batch is not None:
            accumulated = self.args.gradient_accumulation_steps
        loss = output.loss + self._budget.router_lambda * budget_loss / accumulated
        sums = self._sums if model.training else self._eval_sums
        sums.add(output.loss.detach() * accumulated, ratio.detach(), budget_loss.detach())
        return (loss, output) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the means since the last line: LM loss, active ratio, budget loss."""
        if "loss" in logs:
            logs |= self._sums.take()
        super().log(logs, *args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Add the same metrics, and the perplexity."""
        self._eval_sums.take()
        output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        means = self._eval_sums.take()
        output.metrics.update({f"{prefix}_{name}": value for name, value in means.items()})
        output.metrics[f"{prefix}_perplexity"] = math.exp(min(means["lm_loss"], 700))
        return output

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_routers(self._routed, folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_routers(self._routed, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        load_routers(self._routed, Path(self.state.best_model_checkpoint))


class _MetricSums:
    """Running sums on the device: reading them at every step would wait for the device."""

    def __init__(self) -> None:
        self._sums: torch.Tensor | None = None
        self._count = 0

    def add(self, *values: torch.Tensor) -> None:
        added = torch.stack([value.float() for value in values])
        self._sums = added if self._sums is None else self._sums + added
        self._count += 1

    def take(self) -> dict[str, float]:
        names = ("lm_loss", "active_ratio", "budget_loss")
        means = (self._sums / self._count).tolist() if self._sums is not None else [math.nan] * len(names)
        self._sums, self._count = None, 0
        return dict(zip(names, means, strict=True))
