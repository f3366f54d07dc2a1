import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from modcompile.errors import ConfigError
from modcompile.flags import parse_flags
from modcompile.training_arguments import RouterTrainingArguments


def _parse(*argv: str) -> RouterTrainingArguments:
    (arguments,) = parse_flags("test", None, None, [RouterTrainingArguments], argv)
    assert isinstance(arguments, RouterTrainingArguments)
    return arguments


def test_defaults_suit_routers() -> None:
    arguments = _parse()
    assert arguments.learning_rate == 3e-3
    assert arguments.logging_steps == 10
    assert arguments.num_train_epochs == 1.0
    assert arguments.max_steps == -1
    assert arguments.output_or(Path("default")) == Path("default")
    assert arguments.report_to == []


def test_passes_the_flags_of_transformers_on() -> None:
    arguments = _parse(
        *("--output_dir", "out", "--weight_decay", "0.1", "--warmup_steps", "7", "--gradient_accumulation_steps", "4"),
        *("--lr_scheduler_type", "cosine", "--seed", "7", "--adam_beta2", "0.95", "--report_to", "none"),
    )
    assert arguments.output_or(Path("default")) != Path("default")
    assert Path(str(arguments.output_dir)).name == "out"
    assert (arguments.weight_decay, arguments.warmup_steps, arguments.gradient_accumulation_steps) == (0.1, 7, 4)
    assert (arguments.lr_scheduler_type, arguments.seed, arguments.adam_beta2) == ("cosine", 7, 0.95)


def test_max_train_steps_is_max_steps() -> None:
    assert _parse("--max_train_steps", "5").max_steps == 5


@pytest.mark.parametrize("argv", [("--gradient_checkpointing",), ("--gradient_checkpointing", "true")])
def test_gradient_checkpointing_draws_no_warning(argv: tuple[str, ...]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _parse(*argv).gradient_checkpointing
        assert not _parse().gradient_checkpointing


@pytest.mark.parametrize("value", ["false", "False"])
def test_resume_may_be_denied(value: str) -> None:
    assert _parse("--resume_from_checkpoint", value).resume_from_checkpoint is None


@pytest.mark.skipif(torch.accelerator.is_available(), reason="needs a machine with nothing but a CPU")
def test_bf16_runs_on_the_cpu_where_there_is_nothing_else() -> None:
    arguments = _parse("--bf16")
    assert arguments.bf16
    assert arguments.device == torch.device("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_refuses_tf32_where_there_is_none() -> None:
    with pytest.raises(ConfigError, match="--tf32"):
        _parse("--tf32", "true")


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("seed", "-1"),
        ("seed", "4294967296"),
        ("learning_rate", "-1"),
        ("learning_rate", "nan"),
        ("weight_decay", "-0.1"),
        ("num_train_epochs", "0"),
        ("num_train_epochs", "nan"),
        ("max_train_steps", "0"),
        ("warmup_steps", "-1"),
        ("per_device_train_batch_size", "0"),
        ("per_device_eval_batch_size", "0"),
        ("gradient_accumulation_steps", "0"),
        ("logging_steps", "0"),
        ("label_smoothing_factor", "0.1"),
        ("neftune_noise_alpha", "5"),
        ("load_best_model_at_end", "true"),
    ],
)
def test_refuses_what_makes_no_sense_and_names_the_flag(flag: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"--{flag}"):
        _parse(f"--{flag}", value)


@pytest.mark.parametrize("options", [{"learning_rate": -1.0}, {"max_train_steps": 0}])
def test_checks_itself_in_python_too(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        RouterTrainingArguments(**options)
