"""The HF Trainer on a rewritten graph: the loss, its metrics, and checkpoints that hold the routers only."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy, pad
from torch.utils.data import DataLoader
from transformers import Trainer

from modcompile.distillation import divergences
from modcompile.drawn_places import draw_places
from modcompile.errors import ConfigError
from modcompile.objective import LM_LOSS
from modcompile.precision_usage import PrecisionUsage
from modcompile.router_task import RouterTask
from modcompile.routing_totals import RoutingTotals
from modcompile.text_loss import summed_loss
from modcompile.training_arguments import RouterTrainingArguments

_IGNORED = -100
_LARGEST_EXPONENT = 700.0  # exp(710) is no floating-point number


class RouterTrainer(Trainer):
    """Trains the routers of a model on batches of `input_ids`, `attention_mask` and `labels`, `[B, T]`.

    The loss is that of the task's objective; what its budgets limit are means over routed layers and tokens that are
    not padding. Batches of several processes give the gradient of one large batch. So do accumulated ones, as long as
    each is on the same side of a budget's target, and a budget is not squared: a batch can't see the means of those
    after it, and is charged for its own. Of prices that are spread, each batch draws its own.

    `choices` are those of the routers of precisions in the last evaluation, if the task has some.
    """

    def __init__(self, task: RouterTask, **kwargs: Any) -> None:
        super().__init__(model=task.model, **kwargs)
        self._task = task
        names = [name for budget in task.objective.budgets for name in (budget.name, budget.penalty_name)]
        losses = list(task.objective.weights)
        self._training = RoutingTotals(losses, names)
        self._evaluation = RoutingTotals(losses, names)
        self.choices = PrecisionUsage()
        self._tokens_of_update = torch.ones(())

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """That of the HF Trainer, in which depth routers learn at their own rate if they have one."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        assert isinstance(self.args, RouterTrainingArguments)
        if is_new and self.args.router_learning_rate is not None:
            _learn_at(optimizer, self._task.depth_routers, self.args.router_learning_rate)
        return optimizer

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], torch.Tensor | None]:
        """The batches of one update, and how many tokens they predict in all, those of other processes included.

        Counted here, as transformers 4.57 would count the first label of a row, which nothing predicts.
        """
        batches, _ = super().get_batch_samples(*args, **kwargs)
        if not batches:
            return batches, None
        device = self.args.device
        tokens = _total([batch["attention_mask"] != 0 for batch in batches])
        predicted = _total([_is_predicted(batch["labels"]) for batch in batches])
        self._tokens_of_update, of_update = self._summed(torch.stack([tokens, predicted]).to(device)).unbind()
        return batches, of_update

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The loss of a batch; in training, its part of the loss of an update of `num_items_in_batch` predictions."""
        if model.training and self._task.set_progress is not None:
            self._task.set_progress(self._progress)
        is_predicted = _is_predicted(inputs["labels"])
        shares = of_sequences = None
        if model.training and self._task.set_prices is not None:
            # Losses count by the inverse of the price, or those at a high one would be nearly all (`DrawnPrices`).
            of_sequences = 1 / self._task.set_prices(draw_places(self.accelerator, len(is_predicted)))
            shares = of_sequences.unsqueeze(1).expand_as(is_predicted)[is_predicted]
        called = model if model.training else self._task.evaluated
        given = dict(inputs)
        if not self._task.objective.lm_weight:
            del given["labels"]  # its loss is only told: no copies of the logits for its gradient
        output = called(**given, num_items_in_batch=1)
        tokens, predicted = output.tokens.sum(), is_predicted.sum()
        lm_loss = output.loss
        if lm_loss is None:
            lm_loss = output.logits.new_tensor(summed_loss(output.logits.detach(), inputs["labels"]))
        summed = {LM_LOSS: lm_loss}
        total = torch.zeros_like(lm_loss)
        for name, weight in self._task.objective.weights.items():
            if not weight:
                continue  # no way back through the logits for nothing
            if name == LM_LOSS and shares is None:
                part = lm_loss
            else:
                of_tokens = self._losses(name, output.logits, inputs, is_predicted)
                summed[name] = of_tokens.sum()
                part = summed[name] if shares is None else (shares * of_tokens).sum()
            total = total + weight * part
        if model.training and self._task.gate_correction is not None:
            counted = total.new_ones(len(is_predicted)) if of_sequences is None else of_sequences
            correction = self._task.gate_correction(output, pad(is_predicted, (0, 1)), counted)
            total = total + sum(self._task.objective.weights.values()) * correction
        charged = torch.zeros_like(total)
        # In training, budgets limit what all processes spend on this batch together.
        of_all = self._summed(tokens) if model.training else tokens
        for budget in self._task.objective.budgets:
            spent = budget.spent(output)
            means = (self._summed(spent.detach()) + spent - spent.detach() if model.training else spent) / of_all
            penalty = budget.penalty(means, self._progress if model.training else 1.0)
            charged = charged + budget.weight * penalty
            summed |= {budget.name: spent, budget.penalty_name: penalty * tokens}
        totals = self._training if model.training else self._evaluation
        totals.add(predicted, tokens, summed)
        if not model.training and self._task.chosen_bits is not None:
            self.choices.update(self._task.chosen_bits(output), output.tokens)
        if model.training and num_items_in_batch is not None:
            # Gradients are averaged over processes, and are to be added up; so are losses, but all charge the same.
            processes = self.args.world_size
            once = charged - charged.detach() * (1 - 1 / processes)
            loss = (total / num_items_in_batch + once * of_all / self._tokens_of_update) * processes
        else:
            loss = total / predicted + charged
        return (loss, output) if return_outputs else loss

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """Of the whole data, in every process: shares of it would be made equal by repeating rows."""
        if self.args.world_size == 1:
            return super().get_eval_dataloader(eval_dataset)
        dataset: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        return DataLoader(dataset, batch_size=self.args.eval_batch_size, collate_fn=self.data_collator)

    def _summed(self, value: torch.Tensor) -> torch.Tensor:
        """The sum over the processes that train together."""
        total: torch.Tensor = self.accelerator.reduce(value, "sum")
        return total

    @property
    def _progress(self) -> float:
        """The share of the training that is over."""
        return self.state.global_step / self.state.max_steps if self.state.max_steps else 1.0

    def _losses(
        self, name: str, logits: torch.Tensor, inputs: dict[str, Any], is_predicted: torch.Tensor
    ) -> torch.Tensor:
        """One of the losses of each predicted token, `[N]`."""
        if name == LM_LOSS:
            return cross_entropy(
                logits[:, :-1][is_predicted].float(), inputs["labels"][:, 1:][is_predicted], reduction="none"
            )
        assert self._task.dense_logits is not None
        with self.accelerator.autocast():
            dense = self._task.dense_logits(inputs["input_ids"], inputs["attention_mask"])
        return divergences(logits, dense, is_predicted)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the means since the last line: of each loss, and what each budget limits and charges."""
        if "loss" in logs:
            logs |= self._scalars(self._training.take(self._summed))
        super().log(logs, *args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """The same metrics and the perplexity, of all tokens together: the batch size makes no difference."""
        self._evaluation.take()
        self.choices = PrecisionUsage()
        output = super().evaluation_loop(*args, **kwargs)
        by_layer = self._evaluation.take()
        means = self._scalars(by_layer)
        means["loss"] = sum(weight * means[name] for name, weight in self._task.objective.weights.items())
        for budget in self._task.objective.budgets:
            means[budget.penalty_name] = float(budget.penalty(by_layer[budget.name]))
            means["loss"] += budget.weight * means[budget.penalty_name]
        means["perplexity"] = math.exp(min(means[LM_LOSS], _LARGEST_EXPONENT))
        prefix = kwargs.get("metric_key_prefix", "eval")
        metrics = dict(output.metrics or {}) | {f"{prefix}_{name}": value for name, value in means.items()}
        return output._replace(metrics=metrics)

    def _scalars(self, means: dict[str, torch.Tensor]) -> dict[str, float]:
        """Of what is known for each layer, the mean."""
        over_layers = {budget.name: budget.mean for budget in self._task.objective.budgets}
        return {name: float(over_layers.get(name, torch.mean)(mean)) for name, mean in means.items()}

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        self._task.save(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self._task.load(Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except ValueError as error:
            raise ConfigError(
                f"{checkpoint} is of a training of other parameters; give the flags of its training"
            ) from error

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        self._task.load(Path(self.state.best_model_checkpoint))


def _learn_at(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], rate: float) -> None:
    """Give some of the parameters of a new optimizer groups of their own, with another learning rate."""
    chosen = {id(parameter) for parameter in parameters}
    for group in list(optimizer.param_groups):
        moved = [parameter for parameter in group["params"] if id(parameter) in chosen]
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in chosen]
        if moved:
            optimizer.add_param_group({**group, "params": moved, "lr": rate})


def _is_predicted(labels: torch.Tensor) -> torch.Tensor:
    """`[B, T - 1]`: which tokens of a batch are predicted from those before them."""
    return labels[:, 1:] != _IGNORED


def _total(masks: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack([mask.sum() for mask in masks]).sum()
