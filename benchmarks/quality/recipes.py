"""What is trained: routers for all budgets at once, and what they are to beat, with the same adapters and steps."""

from collections.abc import Sequence
from dataclasses import dataclass

ROUTED, STATIC, ORIGINAL = "routed", "static, trained", "the original's recipe"
NAMES = {ROUTED: "routed", STATIC: "static", ORIGINAL: "original"}
"""Of folders and flags."""
SEARCHED, RANDOM = "routed, thresholds searched", "random tokens"
"""Ways of skipping with the routers that `ROUTED` has trained."""

_ORIGINAL_WORK = 0.8

# Attention and MLP apart, with half of the rank that the same parameters would give to adapters of whole blocks: those,
# after 280 steps, lost a fifth more nats on WikiText-2 at 0.8, and a third less at 0.95 (one run, beside three here).
_SAME = (
    "--sequence_length 256 --granularity attn+mlp --router_hidden_size 0 --skip_adapter low_rank --adapter_rank 18 "
    "--lm_weight 0 --distill_weight 1 --learning_rate 2e-3 --lr_scheduler_type cosine --bf16"
)
# A price at which a fifth of the work is skipped at the end. At 0.09 with a spread of 1.5 more than half is, and more
# was lost at 0.8 (prose 1.14, WikiText-2 1.31; one run); at 0.025 with a spread of 2 only a fiftieth.
_ROUTED = f"{_SAME} --router_start_samples 48 --budget_loss price --router_lambda 0.065 --price_spread 1.8 "
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


def by_way(chosen: Sequence[Recipe]) -> dict[str, dict[str, str]]:
    """The flags of each way of skipping, by folder, the routers' first."""
    found: dict[str, dict[str, str]] = {}
    for recipe in chosen:
        found.setdefault(recipe.way, {})[recipe.folder] = recipe.flags
    return found | {SEARCHED: found[ROUTED], RANDOM: found[ROUTED]}
