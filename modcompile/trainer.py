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
from modcompile.routing_totals import RoutingTotals
from modcompile.usage import active_tokens

_IGNORED = -100
_LARGEST_EXPONENT = 700.0  # exp(710) is no floating-point number


class RouterTrainer(Trainer):
    """Trains the routers of a `RoutedForCausalLM` on batches of `input_ids`, `attention_mask` and `labels`, `[B, T]`.

    loss = LM loss + router_lambda * max(active_ratio - target_active_ratio, 0), with the active ratio the mean of the
    gates over routed layers and tokens that are not padding. Accumulated batches give the gradient of one large batch,
    as long as the active ratio of each is on the same side of the target: a batch can't see that of the others.
    """

    def __init__(self, model: RoutedForCausalLM, budget: BudgetConfig, **kwargs: Any) -> None:
        super().__init__(model=model, **kwargs)
        self._routed = model
        self._budget = budget
        self._training = RoutingTotals()
        self._evaluation = RoutingTotals()
        self._tokens_of_update = torch.ones(())

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], torch.Tensor | None]:
        """The batches of one update, and how many tokens they predict in all.

        Counted here, as transformers 4.57 would count the first label of a row, which nothing predicts.
        """
        batches, _ = super().get_batch_samples(*args, **kwargs)
        if not batches:
            return batches, None
        device = self.args.device
        self._tokens_of_update = _total([batch["attention_mask"] != 0 for batch in batches]).to(device)
        return batches, _total([_is_predicted(batch["labels"]) for batch in batches]).to(device)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The loss of a batch; in training, its part of the loss of an update of `num_items_in_batch` predictions."""
        output: RoutedCausalLMOutput = model(**inputs, num_items_in_batch=1)
        assert output.loss is not None and output.gates is not None and output.tokens is not None
        summed_loss, predicted, tokens = output.loss, _is_predicted(inputs["labels"]).sum(), output.tokens.sum()
        active = active_tokens(output.gates, output.tokens).mean()
        budget_loss = (active / tokens - self._budget.target_active_ratio).clamp(min=0)
        totals = self._training if model.training else self._evaluation
        totals.add(summed_loss, predicted, active, budget_loss * tokens, tokens)
        if model.training and num_items_in_batch is not None:
            share = tokens / self._tokens_of_update
            loss = summed_loss / num_items_in_batch + self._budget.router_lambda * budget_loss * share
        else:
            loss = summed_loss / predicted + self._budget.router_lambda * budget_loss
        return (loss, output) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the means since the last line: LM loss, active ratio, budget loss."""
        if "loss" in logs:
            logs |= self._training.take()
        super().log(logs, *args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """The same metrics and the perplexity, of all tokens together: the batch size makes no difference."""
        self._evaluation.take()
        output = super().evaluation_loop(*args, **kwargs)
        means = self._evaluation.take()
        means["budget_loss"] = max(means["active_ratio"] - self._budget.target_active_ratio, 0.0)
        means["loss"] = means["lm_loss"] + self._budget.router_lambda * means["budget_loss"]
        means["perplexity"] = math.exp(min(means["lm_loss"], _LARGEST_EXPONENT))
        prefix = kwargs.get("metric_key_prefix", "eval")
        metrics = dict(output.metrics or {}) | {f"{prefix}_{name}": value for name, value in means.items()}
        return output._replace(metrics=metrics)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        save_routers(self._routed, folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_routers(self._routed, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        load_routers(self._routed, Path(self.state.best_model_checkpoint))


def _is_predicted(labels: torch.Tensor) -> torch.Tensor:
    """`[B, T - 1]`: which tokens of a batch are predicted from those before them."""
    return labels[:, 1:] != _IGNORED


def _total(masks: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack([mask.sum() for mask in masks]).sum()
