"""Train depth gates from the command line: find the folder, or make it, and train in it."""

from dataclasses import replace
from functools import partial
from pathlib import Path

from datasets import DatasetDict
from transformers import set_seed

from modcompile.artifacts import is_routed_folder, read_router_config
from modcompile.checkpoint_config import load_config
from modcompile.checkpoint_sources import fetch_checkpoint, find_checkpoint
from modcompile.checkpoints import load_base, load_tokenizer
from modcompile.config import AUTO_LAYERS, BudgetConfig, RouterConfig
from modcompile.data_config import DataConfig
from modcompile.depth_flags import check_training
from modcompile.depth_training import DepthTraining, Start, start_rows
from modcompile.errors import ConfigError
from modcompile.first_process import in_first_process
from modcompile.loss_config import LossConfig
from modcompile.rewriting import check_routed_target, check_trainable, write_rewritten
from modcompile.start_config import StartConfig
from modcompile.training import load_training_blocks, train_routers
from modcompile.training_arguments import RouterTrainingArguments


def train_depth(
    model: str,
    router: RouterConfig,
    budget: BudgetConfig,
    loss: LossConfig,
    start: StartConfig,
    data: DataConfig,
    training: RouterTrainingArguments,
) -> Path:
    """Train the gates of a routed folder, or of a model that is rewritten first; return the folder.

    Raises:
        ModcompileError: the model, the data or the output folder can't be used.
    """
    given, overwrite = Path(model), training.overwrite_output_dir
    routed = is_routed_folder(given)
    source = find_checkpoint(str(given.resolve()) if routed else model)
    default = given if routed else Path(f"{source.name}-routed")
    folder = output = training.output_or(default)
    resumes = training.resume_from_checkpoint is not None
    stored = output if resumes else given
    check_training(read_router_config(stored) if resumes or routed else router, loss, start, training)

    if resumes:
        blocks = _blocks_for(output, router, data)
    elif routed:
        check = check_trainable if output.resolve() == given.resolve() else check_routed_target
        in_first_process(training, partial(check, output, overwrite=overwrite))
        folder = given
        blocks = _blocks_for(given, router, data)
    else:
        in_first_process(training, partial(check_routed_target, output, overwrite=overwrite))
        # The data before the model, which takes longer.
        tokenizer = load_tokenizer(source)
        blocks = load_training_blocks(data, tokenizer, load_config(source, fetch_checkpoint(source)))

        def rewrite() -> None:
            base = load_base(source)
            set_seed(training.seed)
            write_rewritten(base, tokenizer, router, output, overwrite=overwrite)

        in_first_process(training, rewrite)
    rows = start_rows(blocks["train"], start)
    if resumes:
        rows = Start(is_static=rows.is_static)  # what a checkpoint holds has been fitted
    train_routers(folder, output, blocks, DepthTraining(budget, loss, rows), training)
    return output


def _blocks_for(folder: Path, wanted: RouterConfig, data: DataConfig) -> DatasetDict:
    """The data, for the model and the routers that a routed folder has."""
    stored = read_router_config(folder)
    if wanted.router_layers == AUTO_LAYERS:
        wanted = replace(wanted, router_layers=stored.router_layers)  # what was chosen when it was made
    if wanted not in (RouterConfig(), stored):
        # Not a surprise after the training: flags that would have made other routers.
        raise ConfigError(
            f"{folder} has routers of its own ({stored}); leave the router flags out, or start from the base model"
        )
    source = find_checkpoint(str(folder.resolve()))
    return load_training_blocks(data, load_tokenizer(source), load_config(source, fetch_checkpoint(source)))
