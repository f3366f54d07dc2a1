"""python -m modcompile.train: train the routers of a folder, or of a model that is rewritten or quantized first.

Depth gates: loss = lm_weight * LM loss + distill_weight * KL(dense, routed) + router_lambda * budget loss, which is
max(active_ratio - target_active_ratio, 0) unless --budget_loss says otherwise. Precisions, of a quantized folder or
with --precisions: loss = ce_weight * LM loss + precision_weight * max(average_bits - avg_bits_target, 0) / (the most
bits), and the budget loss of the depth gates where there are some. The base stays frozen.

Routers of precisions that a folder has are trained further, with the scope, mixing and dropout that they have where no
flag names another; another --router_scope, or --precisions that they do not know, make new ones.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import distributed

from modcompile.cli import run
from modcompile.config import BudgetConfig, RouterConfig
from modcompile.data_config import DataConfig
from modcompile.errors import ConfigError
from modcompile.flags import named_flags, parse_flags
from modcompile.loss_config import LossConfig
from modcompile.precision_config import PrecisionBudgetConfig, RoundingConfig
from modcompile.precision_folder import holds_precisions
from modcompile.reused_memory import reuse_freed_memory
from modcompile.start_config import StartConfig
from modcompile.train_depth import train_depth
from modcompile.train_precisions import PrecisionFlags, train_precisions
from modcompile.training_arguments import RouterTrainingArguments


@dataclass(frozen=True)
class _Model:
    model_name_or_path: str = field(
        metadata={
            "help": "A routed or quantized folder, or a model as for modcompile.rewrite, which is rewritten first (or, "
            "with --precisions, quantized)."
        }
    )


_CONFIGS = (
    _Model,
    RouterConfig,
    BudgetConfig,
    LossConfig,
    StartConfig,
    PrecisionFlags,
    RoundingConfig,
    PrecisionBudgetConfig,
    DataConfig,
    RouterTrainingArguments,
)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, make the output folder, and train in it."""
    model, router, budget, loss, start, precision, rounding, bits, data, training = parse_flags(
        "modcompile.train", __doc__, None, _CONFIGS, argv
    )
    given = model.model_name_or_path
    if precision.precisions is not None or holds_precisions(Path(given)):
        if (loss, start) != (LossConfig(), StartConfig()):
            raise ConfigError(
                "--lm_weight, --distill_weight, --gate_temperature, --gate_gradient, and all of --*_samples that "
                "adapters and routers start with are for depth gates alone; leave them out (see --ce_weight)"
            )
        if budget.price_spread != 1 or training.router_learning_rate is not None:
            raise ConfigError("--price_spread and --router_learning_rate are for depth gates alone; leave them out")
        named = named_flags(_CONFIGS, argv)
        output = train_precisions(given, precision, rounding, bits, router, budget, data, training, named)
    else:
        if (precision, rounding, bits) != (PrecisionFlags(), RoundingConfig(), PrecisionBudgetConfig()):
            raise ConfigError(
                f"{given} is not quantized, so there is no precision to choose; give --precisions to quantize it"
            )
        output = train_depth(given, router, budget, loss, start, data, training)
    if training.process_index == 0:
        print(f"wrote {output}")
    if distributed.is_initialized():
        # Or its threads, which outlive the interpreter, can abort a process at its end.
        distributed.destroy_process_group()


if __name__ == "__main__":
    reuse_freed_memory()
    sys.exit(run(main))
