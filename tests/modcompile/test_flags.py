import importlib
import re
from dataclasses import dataclass, field
from typing import Literal

import pytest

from modcompile.config import check
from modcompile.errors import ConfigError
from modcompile.flags import named_flags, parse_flags


@dataclass(frozen=True)
class _Options:
    width: int = field(default=3, metadata={"help": "How wide."})
    shape: Literal["round", "square"] = field(default="round", metadata={"help": "Which shape."})
    deep: bool = field(default=False, metadata={"help": "Whether it is deep."})
    smooth: bool = field(default=True, metadata={"help": "Whether it is smooth.", "negated": "--rough"})

    def __post_init__(self) -> None:
        check("width", self.width, at_least=1)


@dataclass(frozen=True)
class _Output:
    output_dir: str | None = field(default=None, metadata={"help": "Where to write."})


def test_one_instance_for_each_dataclass_and_the_positional_argument() -> None:
    argv = ["model", "--width", "5", "--deep", "--output_dir", "out"]
    parsed = parse_flags("test", None, ("name", "A name."), [_Options, _Output], argv)
    assert parsed == (_Options(5, "round", True), _Output("out"), "model")
    assert parse_flags("test", None, None, [_Options], []) == (_Options(),)


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        ([], set()),
        (["--width", "3"], {"width"}),
        (["--sha=round", "--output-dir", "out"], {"shape", "output_dir"}),
        (["--deep", "false", "--rough"], {"deep", "smooth"}),
    ],
)
def test_tells_which_flags_are_named_even_with_their_defaults(argv: list[str], named: set[str]) -> None:
    assert named_flags([_Options, _Output], argv) == named


@pytest.mark.parametrize("flag", ["--rough", "--no_smooth"])
def test_what_makes_a_flag_false_may_have_a_name(flag: str) -> None:
    (parsed,) = parse_flags("test", None, None, [_Options], [flag])
    assert not parsed.smooth


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--width", "0"], "--width is 0; it must be a number, at least 1"),
        (["--width", "many"], "argument --width: invalid int value: 'many'"),
        (["--width"], "argument --width: expected one argument"),
        (["--shape", "flat"], "argument --shape: invalid choice: 'flat'"),
        (["--depth", "3"], "unknown: --depth 3"),
    ],
)
def test_a_bad_flag_is_one_line_without_the_usage(argv: list[str], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_flags("test", None, ("name", "A name."), [_Options], ["model", *argv])
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "usage" not in str(caught.value)


def test_a_missing_positional_argument_is_one_line() -> None:
    with pytest.raises(ConfigError, match="the following arguments are required: name"):
        parse_flags("test", None, ("name", "A name."), [_Options], [])


_ROUTER = {
    "router_hidden_size": "32",
    "router_dropout": "0.0",
    "router_pattern": "all",
    "router_start": "0",
    "router_stop": "None",
    "router_lambda": "0.01",
    "target_active_ratio": "0.7",
    "layer_norm_router_input": "True",
    "lock_first_layers": "0",
    "lock_last_layers": "0",
    "gate": "straight_through",
    "router_init_bias": "None",
}
_TRAINING = {
    "dataset_name": "None",
    "dataset_config_name": "None",
    "train_file": "None",
    "validation_file": "None",
    "sequence_length": "512",
    "per_device_train_batch_size": "8",
    "per_device_eval_batch_size": "8",
    "learning_rate": "0.003",
    "weight_decay": "0.0",
    "num_train_epochs": "1.0",
    "max_train_steps": "None",
    "warmup_steps": "0",
    "logging_steps": "10",
    "gradient_accumulation_steps": "1",
    "gradient_checkpointing": "False",
    "bf16": "False",
    "tf32": "None",
    "seed": "42",
    "resume_from_checkpoint": "None",
    "output_dir": "None",
    "overwrite_output_dir": "False",
}
_EXPORT = {"hard_threshold": "0.5", "emit_routing": "False", "fold_gates": "auto", "always_active": "None"}
_COMMANDS: dict[str, dict[str, str]] = {
    "modcompile.rewrite": {**_ROUTER, **_TRAINING, **_EXPORT, "export": "False"},
    "modcompile.train": {**_ROUTER, **_TRAINING},
    "modcompile.export.__main__": {**_EXPORT, "output_dir": "None"},
    "modcompile.evaluate": {"hard_threshold": "0.5", "text_file": "None"},
    "modcompile.generate": {"runtime": "torch", "max_new_tokens": "50", "hard_threshold": "None"},
}


@pytest.mark.parametrize("command", _COMMANDS)
def test_help_explains_every_flag_with_its_default(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        importlib.import_module(command).main(["--help"])
    assert caught.value.code == 0
    entries = [" ".join(entry.split()) for entry in re.split(r"\n  (?=--)", capsys.readouterr().out)]
    for flag, default in _COMMANDS[command].items():
        (entry,) = [entry for entry in entries if re.match(rf"--{flag}\b", entry)]
        explanation, _, told = entry.rpartition(" (default: ")
        assert told == f"{default})", flag
        assert len(re.findall(r"\b[a-z]{2,}\b", explanation)) > 3, flag
