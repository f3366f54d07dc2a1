import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import HfArgumentParser
from transformers.hf_argparser import DataClassType

from modcompile.data_config import DataConfig
from modcompile.errors import ConfigError

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset_name": "builtin", "train_file": "a.txt"}, "exclude each other"),
        ({"dataset_config_name": "raw", "train_file": "a.txt"}, "--dataset_config_name needs --dataset_name"),
        ({"dataset_name": "builtin", "dataset_config_name": "raw"}, "no configurations"),
        ({"validation_file": "a.txt"}, "--validation_file needs --train_file"),
        ({"dataset_name": "builtin", "validation_file": "a.txt"}, "--validation_file needs --train_file"),
        ({"sequence_length": 1}, "--sequence_length is 1"),
        ({"validation_split_percentage": 0.0}, "--validation_split_percentage is 0"),
        ({"validation_split_percentage": 100.0}, "--validation_split_percentage is 100"),
        ({"validation_split_percentage": float("nan")}, "--validation_split_percentage is nan"),
        ({"max_train_samples": 0}, "--max_train_samples is 0"),
        ({"max_eval_samples": -1}, "--max_eval_samples is -1"),
    ],
)
def test_rejects_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DataConfig(**options)


def test_every_field_is_a_flag_with_help() -> None:
    parser = HfArgumentParser(DataClassType(DataConfig))
    (config,) = parser.parse_args_into_dataclasses(
        ["--train_file", "a.txt", "--validation_file", "b.txt", "--sequence_length", "64", "--max_eval_samples", "3"]
    )
    assert config == DataConfig(train_file="a.txt", validation_file="b.txt", sequence_length=64, max_eval_samples=3)
    assert all(action.help for action in parser._actions)


def test_the_library_of_data_sets_is_left_alone_until_there_are_data() -> None:
    script = "import sys, modcompile.rewrite; print(sorted({'datasets', 'matplotlib'} & sys.modules.keys()))"
    finished = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert finished.stdout == "[]\n"
