"""What routers are trained for: the language model's loss, and budgets of what it may spend."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from modcompile.config import BudgetConfig, BudgetLoss
from modcompile.precision_config import PrecisionBudgetConfig
from modcompile.usage import active_tokens

LM_LOSS, DISTILL_LOSS = "lm_loss", "distill_loss"


@dataclass(frozen=True)
class Budget:
    """A mean over tokens and routed layers, and what is charged for it.

    Layers weigh in means over them as `work` says, alike if it says nothing. With `over = (mean - target) / scale`,
    where the target is that of the step, the charge is `weight` times

    - hinge: `max(over, 0)`
    - squared: `over ** 2`
    - per_layer: the mean over layers of `max(over, 0)`, each of its own mean
    - price: the sum over layers of `mean`, by their work: how many blocks a token goes through, whatever the target
    """

    name: str
    """Of the mean in metrics."""
    penalty_name: str
    weight: float
    target: float
    scale: float
    spent: Callable[[Any], torch.Tensor]
    """From the output of a model to `[R]`: for each layer, summed over tokens."""
    kind: BudgetLoss = "hinge"
    warmup_ratio: float = 0.0
    """Over which share of the steps the target falls from `scale`, all there is, to `target`."""
    work: tuple[float, ...] | None = None
    """One for each layer."""

    def target_at(self, progress: float) -> float:
        """The target after a share of the training, in [0, 1]."""
        left = 1 - progress / self.warmup_ratio if progress < self.warmup_ratio else 0.0
        return self.target + (self.scale - self.target) * left

    def penalty(self, means: torch.Tensor, progress: float = 1.0) -> torch.Tensor:
        """What the means `[R]` of the layers are charged in all, before the weight.

        Without `progress` against the last target, as in an evaluation.
        """
        if self.kind == "price":
            return (means * self._work(means)).sum()
        over = (means - self.target_at(progress)) / self.scale
        if self.kind == "squared":
            return self.mean(over).square()
        return self.mean(over.clamp(min=0)) if self.kind == "per_layer" else self.mean(over).clamp(min=0)

    def mean(self, by_layer: torch.Tensor) -> torch.Tensor:
        """Over layers, from `[R]`."""
        work = self._work(by_layer)
        return (work * by_layer).sum() / work.sum()

    def _work(self, like: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(like) if self.work is None else like.new_tensor(self.work)


@dataclass(frozen=True)
class Objective:
    """loss = lm_weight * LM loss + distill_weight * KL to the dense model + the sum of weight * penalty of budgets."""

    budgets: tuple[Budget, ...]
    lm_weight: float = 1.0
    distill_weight: float = 0.0

    @property
    def weights(self) -> dict[str, float]:
        """Of the losses that are means over predicted tokens, by their names in metrics."""
        return {LM_LOSS: self.lm_weight} | ({DISTILL_LOSS: self.distill_weight} if self.distill_weight else {})


def depth_budget(config: BudgetConfig, work: Sequence[float] | None = None) -> Budget:
    """Of the share of tokens and layers that are executed, by the work of each layer."""
    return Budget(
        "active_ratio",
        "budget_loss",
        config.router_lambda,
        0.0 if config.budget_loss == "price" else config.target_active_ratio,
        1.0,
        _active_tokens,
        config.budget_loss,
        config.target_warmup_ratio,
        None if work is None else tuple(work),
    )


def bits_budget(config: PrecisionBudgetConfig, precisions: list[int]) -> Budget:
    """Of the expected bits of a token's block, as a share of the most it can have; a skipped block has none."""
    num_bits = torch.tensor(precisions, dtype=torch.float32)
    target = 0.0 if config.avg_bits_target is None else config.avg_bits_target
    return Budget(
        "average_bits",
        "bits_loss",
        config.precision_weight,
        target,
        float(max(precisions)),
        lambda output: expected_bits(output, num_bits),
    )


def expected_bits(output: Any, num_bits: torch.Tensor) -> torch.Tensor:
    """`[L]`: for each layer the bits of `num_bits` (float32 `[P]`), weighted by its router, summed over tokens.

    `output` is that of `train_forward`. Closed gates count as 0 bits; padding does not count.
    """
    tokens = output.tokens.float()
    by_layer = [
        (weights.float() @ num_bits.to(weights.device)).expand_as(tokens) for weights in output.precision_weights
    ]
    for layer, gate in (output.gates or {}).items():
        by_layer[layer] = by_layer[layer] * gate.squeeze(-1).float()
    return torch.stack([(bits * tokens).sum() for bits in by_layer])


def _active_tokens(output: Any) -> torch.Tensor:
    """`[R]`; models with precisions name the layers of their gates, as not all of their layers have one."""
    gates = output.gates
    return active_tokens(list(gates.values()) if isinstance(gates, Mapping) else gates, output.tokens)
