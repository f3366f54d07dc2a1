"""Train the routers of a routed folder."""

from pathlib import Path
from typing import Any

from datasets import DatasetDict
from transformers import PretrainedConfig, PreTrainedTokenizerBase, default_data_collator, set_seed
from transformers.trainer_utils import get_last_checkpoint

from modcompile.artifacts import ROUTERS, load_with_routers, save_router_weights, update_report
from modcompile.config import BudgetConfig
from modcompile.data import DataConfig
from modcompile.durable_files import replace_file
from modcompile.errors import ArtifactError, DataError
from modcompile.packing import load_blocks
from modcompile.progress import show_elapsed
from modcompile.rewriting import describe, share_of_parameters
from modcompile.trainer import RouterTrainer
from modcompile.training_arguments import RouterTrainingArguments


def load_training_blocks(
    data: DataConfig, tokenizer: PreTrainedTokenizerBase | None, config: PretrainedConfig
) -> DatasetDict:
    """The splits `train` and `validation`, tokenized for a model and cut into blocks.

    Raises:
        DataError: the data can't be read or used, or the model has no tokenizer.
        ConfigError: the sequence length is above the model's positions.
    """
    if tokenizer is None:
        raise DataError("the model has no tokenizer, so no text can be made into tokens for it; add its tokenizer files")
    return load_blocks(data, tokenizer, max_positions=getattr(config, "max_position_embeddings", None))


def train_routers(folder: Path, blocks: DatasetDict, budget: BudgetConfig, training: RouterTrainingArguments) -> dict[str, Any]:
    """Train the routers in `folder`, in place, and return the metrics; checkpoints are written beside them.

    At every moment `folder` is whole: the routers are replaced in one step, at the end.

    Raises:
        ArtifactError: the folder is not a routed one, or there is no checkpoint to resume from.
    """
    training.output_dir = str(folder)
    resume = _checkpoint(folder, training.resume_from_checkpoint)
    set_seed(training.seed)
    with show_elapsed("loading and tracing"):
        model = load_with_routers(folder, None, device=training.device, use_cache=False)
    print(describe(model))
    trainer = RouterTrainer(
        model,
        budget,
        args=training,
        train_dataset=blocks["train"],
        eval_dataset=blocks["validation"],
        data_collator=default_data_collator,
    )
    result = trainer.train(resume_from_checkpoint=resume)
    metrics = {**result.metrics, **trainer.evaluate()}
    if trainer.is_world_process_zero():
        replace_file(folder / ROUTERS, lambda staging: save_router_weights(model, staging))
        report = {
            "budget": vars(budget),
            "steps": result.global_step,
            "metrics": metrics,
            "parameters": share_of_parameters(model),
            "history": trainer.state.log_history,
        }
        update_report(folder, "training", report)
    return metrics


def _checkpoint(folder: Path, resume: str | None) -> str | None:
    """The checkpoint to resume from: a path, or with `true` the last one in `folder`."""
    if resume is None or resume.lower() == "false":
        return None
    found = get_last_checkpoint(str(folder)) if resume.lower() == "true" else resume
    if found is None or not Path(found).is_dir():
        raise ArtifactError(
            f"there is no checkpoint to resume from at {folder if found is None else found}; "
            "give the path of one, or train without --resume_from_checkpoint"
        )
    return found
