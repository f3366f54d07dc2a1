"""Train routers on a rewritten graph, in the folder where they are kept."""

import shutil
from pathlib import Path
from typing import Any, Protocol

import torch
from datasets import DatasetDict
from transformers import PretrainedConfig, PreTrainedTokenizerBase, default_data_collator, set_seed

from modcompile.artifacts import update_report
from modcompile.data_config import DataConfig
from modcompile.disk_errors import output_errors
from modcompile.errors import DataError
from modcompile.first_process import in_first_process
from modcompile.packing import load_blocks
from modcompile.progress import show_elapsed
from modcompile.router_task import RouterTask
from modcompile.share_of_parameters import share_of_parameters
from modcompile.text_loss import count_predicted_tokens
from modcompile.trainer import RouterTrainer
from modcompile.training_arguments import RouterTrainingArguments
from modcompile.training_checkpoints import find_training_checkpoint, training_checkpoints
from modcompile.training_plots import plot_training


def load_training_blocks(
    data: DataConfig, tokenizer: PreTrainedTokenizerBase | None, config: PretrainedConfig
) -> DatasetDict:
    """The splits `train` and `validation`, tokenized for a model and cut into blocks.

    Raises:
        DataError: the data can't be read or used, or the model has no tokenizer, or one of another model.
        ConfigError: the sequence length is above the model's positions.
    """
    if tokenizer is None:
        raise DataError("the model has no tokenizer to make text into tokens with; add its tokenizer files")
    blocks = load_blocks(data, tokenizer, max_positions=getattr(config, "max_position_embeddings", None))
    for part in blocks.values():
        count_predicted_tokens(part, config.vocab_size)  # refuses tokens that the model does not have
    return blocks


class RouterTraining(Protocol):
    """What differs between trainings: of which routers, in which kind of folder."""

    def open(self, folder: Path, device: torch.device) -> RouterTask:
        """The model of a folder, ready to be trained."""

    def copy(self, source: Path, folder: Path, *, overwrite: bool) -> None:
        """Copy a folder to where it is trained in."""

    def report(self, task: RouterTask) -> dict[str, Any]:
        """What `report.json` tells of it."""


def train_routers(
    folder: Path, output: Path, blocks: DatasetDict, kind: RouterTraining, training: RouterTrainingArguments
) -> dict[str, Any]:
    """Train the routers of `folder` in `output`, the same folder or a copy, and return the metrics.

    Checkpoints are written to `output`; its routers are replaced in one step, at the end, so that it is whole at every
    moment. Unless the training resumes from one, checkpoints of an earlier training are removed.

    Raises:
        ArtifactError: `folder` can't be used, or there is no checkpoint to resume from.
        OutputError: `output` can't be written.
    """
    resume = training.resume_from_checkpoint
    checkpoint = None if resume is None else find_training_checkpoint(output, resume)
    training.output_dir = str(output)
    set_seed(training.seed)
    with show_elapsed("loading and tracing"):
        task = kind.open(folder, training.device)
    if training.process_index == 0:
        print(task.description)
    trainer = RouterTrainer(
        task,
        args=training,
        train_dataset=blocks["train"],
        eval_dataset=blocks["validation"],
        data_collator=default_data_collator,
    )

    def prepare() -> None:
        if output.resolve() != folder.resolve():
            kind.copy(folder, output, overwrite=training.overwrite_output_dir)
        if checkpoint is None:
            with output_errors(output):
                for earlier in training_checkpoints(output):
                    shutil.rmtree(earlier)

    # Nothing is written before it is known that all of the above can be used.
    in_first_process(training, prepare)
    result = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    for finish in task.finish:
        finish()
    report = {**kind.report(task), "steps": result.global_step, "parameters": share_of_parameters(task.model)}
    # Before the evaluation, which may be interrupted, or bring the routers to another dtype (--bf16_full_eval).
    if trainer.is_world_process_zero():
        task.save(output)
        update_report(output, "training", report)
    metrics = {**result.metrics, **trainer.evaluate()}
    if trainer.is_world_process_zero():
        history, shares = trainer.state.log_history, trainer.choices.shares
        report |= {"metrics": metrics, "history": history} | ({"shares_per_layer": shares} if shares else {})
        update_report(output, "training", report)
        plot_training(history, task.objective.budgets, shares, output)
    return metrics
