"""The HF Trainer's arguments, with defaults that suit a few thousand parameters."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import TrainingArguments

from modcompile.config import check
from modcompile.errors import ConfigError


@dataclass
class RouterTrainingArguments(TrainingArguments):
    """Every flag of the HF Trainer, and `--max_train_steps`, as the no-trainer scripts call it.

    Raises:
        ConfigError: a number is outside of its range.
    """

    output_dir: str | None = field(default=None, metadata={"help": "Where to write (by default NAME-routed)."})
    learning_rate: float = field(default=3e-3, metadata={"help": "The initial learning rate of AdamW."})
    router_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "That of depth routers, where adapters beside them have learning_rate (by default the same). "
            "Fitted routers take less than fitted adapters: 2e-4 beside 2e-3, say."
        },
    )
    logging_steps: float = field(default=10, metadata={"help": "Print a line of metrics every so many steps."})
    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the training data."})
    max_train_steps: int | None = field(
        default=None, metadata={"help": "Optimizer steps to train for, whatever the number of epochs (as --max_steps)."}
    )
    gradient_checkpointing: bool = field(
        default=False,
        metadata={"help": "Run each block again in the backward pass, to keep fewer activations."},
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={"help": "Go on from a checkpoint: its folder, or `true` for the last whole one in --output_dir."},
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Replace an output folder that modcompile did not make, or trained routers."}
    )

    def __post_init__(self) -> None:
        check("seed", self.seed, at_least=0, below=2**32)
        check("learning_rate", self.learning_rate, at_least=0)
        if self.router_learning_rate is not None:
            check("router_learning_rate", self.router_learning_rate, at_least=0)
        check("weight_decay", self.weight_decay, at_least=0)
        check("num_train_epochs", self.num_train_epochs, above=0)
        check("per_device_train_batch_size", self.per_device_train_batch_size, at_least=1)
        check("per_device_eval_batch_size", self.per_device_eval_batch_size, at_least=1)
        check("gradient_accumulation_steps", self.gradient_accumulation_steps, at_least=1)
        check("warmup_steps", self.warmup_steps, at_least=0)
        for name in ("label_smoothing_factor", "neftune_noise_alpha"):
            if getattr(self, name):
                raise ConfigError(f"--{name} changes what the frozen model computes, not its routers; leave it out")
        if self.max_train_steps is not None:
            check("max_train_steps", self.max_train_steps, at_least=1)
            self.max_steps = self.max_train_steps
        # What transformers calls it from 5.23 on, where the old name draws a warning.
        if hasattr(self, "activation_checkpointing"):
            self.activation_checkpointing = bool(self.activation_checkpointing) or self.gradient_checkpointing
        # Reports go to report.json and stdout, unless a service is asked for by name.
        self.report_to = "none" if self.report_to in (None, "all") else self.report_to
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.cuda.is_available()
        if (self.resume_from_checkpoint or "").lower() == "false":
            self.resume_from_checkpoint = None
        # Without an accelerator the CPU is what is meant; the HF arguments would refuse --bf16 on it.
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        if self.ddp_find_unused_parameters is None:
            # Every parameter is used. Looking for others hands out copies of what a model returns, whose logits do not
            # depend on its gates: `--gate_gradient second_order` needs them to.
            self.ddp_find_unused_parameters = False
        self._given_output = self.output_dir
        super().__post_init__()

    def output_or(self, default: Path) -> Path:
        """The folder of --output_dir, or `default` where that was not given."""
        return default if self._given_output is None else Path(self._given_output)
