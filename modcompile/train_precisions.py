"""Train routers of precisions from the command line: find the quantized folder, or make it, and train in it."""

import shutil
from collections.abc import Set as AbstractSet
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from modcompile.artifacts import ROUTER_CONFIG, ROUTERS, is_routed_folder, read_router_config
from modcompile.calibration_text import load_calibration_text
from modcompile.checkpoint_config import load_config
from modcompile.checkpoint_sources import fetch_checkpoint, find_checkpoint
from modcompile.checkpoints import load_base, load_tokenizer
from modcompile.config import BudgetConfig, RouterConfig, check_choice
from modcompile.data_config import DataConfig
from modcompile.errors import ConfigError
from modcompile.precision_config import (
    PrecisionBudgetConfig,
    PrecisionRouterConfig,
    PrecisionRoutingConfig,
    QuantizationConfig,
    RoundingConfig,
)
from modcompile.precision_folder import holds_precisions
from modcompile.precision_graphs import check_composable
from modcompile.precision_training import PrecisionTraining, TrainedRouters
from modcompile.quantized_folder import write_quantized_folder
from modcompile.quantized_target import check_quantized_target
from modcompile.quantizing import quantize_base
from modcompile.tracing import find_layers
from modcompile.training import load_training_blocks, train_routers
from modcompile.training_arguments import RouterTrainingArguments


@dataclass(frozen=True)
class PrecisionFlags(PrecisionRoutingConfig):
    """From which precisions blocks choose, and by what.

    Raises:
        ConfigError: an option is outside of its range.
    """

    precisions: list[int] | None = field(
        default=None,
        metadata={
            "help": "Bits that blocks choose from: any of 2, 4, 8 and 16 (a model that is not quantized is quantized "
            "to them), or some of those that the folder has (by default those of its routers, else all)."
        },
    )
    route_depth: bool = field(
        default=False,
        metadata={"help": "Give the blocks of a quantized folder depth gates, too, by the flags of these."},
    )
    trained_routers: TrainedRouters = field(
        default="both",
        metadata={"help": "Where there are depth gates beside precisions: train both, or one after the other."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("trained_routers", self.trained_routers, ("both", "depth", "precision"))


def train_precisions(
    model: str,
    flags: PrecisionFlags,
    rounding: RoundingConfig,
    bits: PrecisionBudgetConfig,
    router: RouterConfig,
    budget: BudgetConfig,
    data: DataConfig,
    training: RouterTrainingArguments,
    named: AbstractSet[str],
) -> Path:
    """Train the routers of a quantized folder, or of a model that is quantized first; return the folder.

    Of the flags of routers, only those `named` count where the folder has routers: it keeps its own for the others.

    Raises:
        ModcompileError: the model, the data or the output folder can't be used.
    """
    given, overwrite, resumes = Path(model), training.overwrite_output_dir, training.resume_from_checkpoint is not None
    quantized = holds_precisions(given)
    source = find_checkpoint(str(given.resolve()) if given.is_dir() else model)
    default = given if quantized else Path(f"{source.name}-quantized")
    output = training.output_or(default)
    folder = given if quantized and not resumes else output
    _check_used(given, folder, flags, rounding, router, quantized=quantized)
    if flags.route_depth or is_routed_folder(given):
        check_composable(router if flags.route_depth else read_router_config(given))  # not after minutes of work
    options = asdict(PrecisionRouterConfig(flags.router_scope, flags.precision_mixing, router.router_dropout))
    if not resumes:
        check_quantized_target(output, source, in_place=quantized, overwrite=overwrite)
    tokenizer = load_tokenizer(source)
    blocks = load_training_blocks(data, tokenizer, load_config(source, fetch_checkpoint(source)))
    if not (quantized or resumes):
        assert flags.precisions is not None
        config = QuantizationConfig(**asdict(rounding), precisions=flags.precisions)
        base = load_base(source)
        if flags.route_depth:
            router.routed_layers(len(find_layers(base)))  # refused before anything is written
        calibration = load_calibration_text(config, tokenizer, base.config)
        write_quantized_folder(quantize_base(base, config, calibration), tokenizer, output, overwrite=overwrite)
        if is_routed_folder(given):
            for name in (ROUTERS, ROUTER_CONFIG):
                shutil.copyfile(given / name, output / name)
    start = None
    if not resumes and bits.avg_bits_target is not None and bits.static_start_samples:
        start = blocks["train"].select(range(min(bits.static_start_samples, blocks["train"].num_rows)))
    depth = router if flags.route_depth else None
    named_options = {name: value for name, value in options.items() if name in named}
    kind = PrecisionTraining(flags.precisions, named_options, depth, flags.trained_routers, bits, budget, start)
    train_routers(folder, output, blocks, kind, training)
    return output


def _check_used(
    given: Path, folder: Path, flags: PrecisionFlags, rounding: RoundingConfig, router: RouterConfig, *, quantized: bool
) -> None:
    """Refuse flags that would change nothing: not a surprise after the training."""
    if quantized and rounding != RoundingConfig():
        raise ConfigError(f"{given} is quantized already; leave the flags of quantization out, or start from the model")
    if flags.route_depth:
        return
    if replace(router, router_dropout=0.0) != RouterConfig():
        raise ConfigError("the flags of depth gates make new ones; give --route_depth too, or leave them out")
    if flags.trained_routers == "depth" and not (is_routed_folder(folder) or is_routed_folder(given)):
        raise ConfigError(
            f"--trained_routers is 'depth', but {given} has no depth gates; give --route_depth to add some"
        )
