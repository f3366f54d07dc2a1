"""What is trained: routers for all budgets at once, and what they are to beat, with the same adapters and steps."""

from collections.abc import Sequence
from dataclasses import dataclass

ROUTED, STATIC, ORIGINAL = "routed", "static, trained", "the original's recipe"
NAMES = {ROUTED: "routed", STATIC: "static", ORIGINAL: "original"}
"""Of folders and flags."""

_ORIGINAL_WORK = 0.8

# Attention and MLP apart, with half of the rank that the same parameters would give to adapters of whole blocks: those,
# after 280 steps, lost a fifth more nats on WikiText-2 at 0.8, and a third less at 0.95 (one run, beside three here).
_SAME = (
    "--sequence_length 256 --granularity attn+mlp --router_hidden_size 0 --skip_adapter low_rank --adapter_rank 18 "
    "--lm_weight 0 --distill_weight 1 --learning_rate 2e-3 --lr_scheduler_type cosine --bf16"
)
# A price at which half of the work is skipped: adapters learn most where many are used, for all budgets. With 0.05 and
# a spread of 2.5, at which an eighth is, more was lost at 0.8 on all texts (one run each, of 100 steps).
_ROUTED = f"{_SAME} --router_start_samples 48 --budget_loss price --router_lambda 0.09 --price_spread 1.5 "
_ROUTED += "--router_learning_rate 5e-4 --gate_gradient second_order"
_STATIC = f"{_SAME} --static_selection_samples 4"
_ORIGINAL = "--sequence_length 256 --gate soft --router_init_bias 1e-3 --router_lambda 1 --learning_rate 1e-3 --bf16"


@dataclass(frozen=True)
class Recipe:
    """One training."""

    way: str
    flags: str
    """Of `modcompile.train`, but for model, texts, steps and seed."""
    work: float | None = None
    """The budget that it is for; None where thresholds make it any."""

    @property
    def folder(self) -> str:
        """The name of the folder that it goes into."""
        return NAMES[self.way] + ("" if self.work is None else f"-{self.work:g}")


def recipes(works: Sequence[float]) -> list[Recipe]:
    """The routers first, then what they are compared with at each share of the work."""
    static = [Recipe(STATIC, f"{_STATIC} --target_active_ratio {work:g}", work) for work in works]
    original = Recipe(ORIGINAL, f"{_ORIGINAL} --target_active_ratio {_ORIGINAL_WORK:g}", _ORIGINAL_WORK)
    return [Recipe(ROUTED, _ROUTED), *static, original]
