"""Trainings of two processes, as `torchrun` starts them on a machine without a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from modcompile.artifacts import read_report
from modcompile.train import main

_FLAGS = (
    *("--sequence_length", "16", "--max_train_steps", "3", "--logging_steps", "1", "--save_strategy", "no"),
    *("--max_eval_samples", "3", "--learning_rate", "0.05", "--skip_adapter", "low_rank", "--distill_weight", "1"),
    *("--router_lambda", "2", "--target_active_ratio", "0", "--budget_loss", "per_layer", "--gate", "soft"),
    *("--lr_scheduler_type", "constant", "--adapter_start_samples", "2", "--use_cpu"),
)


def _in_two_processes(module: str, argv: list[str]) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return subprocess.run(
        [*command, "-m", module, *argv],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def _train_in_two_processes(argv: list[str]) -> None:
    result = _in_two_processes("modcompile.train", argv)
    assert result.returncode == 0, result.stderr


_OTHER_FLAGS = {
    "base": (),
    "fitted": ("--router_hidden_size", "0", "--router_start_samples", "2"),
    "routed": (),
    "priced": ("--budget_loss", "price", "--price_spread", "3", "--lm_weight", "0"),
    # Adam makes a step of what rounding leaves of a gradient of nothing, of which some adapter of so many has one.
    "halves": ("--granularity", "attn+mlp", "--optim", "sgd", "--learning_rate", "0.5"),
    "squared": ("--budget_loss", "squared", "--target_active_ratio", "0.9"),
}


@pytest.mark.parametrize("start", _OTHER_FLAGS)
def test_two_processes_train_what_one_does(
    base_folder: Path, routed_folder: Path, train_file: Path, tmp_path: Path, start: str
) -> None:
    """Each has half of every batch; rows differ in length."""
    model = routed_folder if start == "routed" else base_folder
    flags = [*_FLAGS, *_OTHER_FLAGS[start]]
    if start == "routed":
        flags = [flag for flag in flags if flag not in ("--skip_adapter", "low_rank", "--gate", "soft")]
    argv = ["--model_name_or_path", str(model), "--train_file", str(train_file), *flags]
    one, two = tmp_path / "one", tmp_path / "two"
    main([*argv, "--output_dir", str(one), "--per_device_train_batch_size", "4"])
    _train_in_two_processes([*argv, "--output_dir", str(two), "--per_device_train_batch_size", "2"])
    expected, actual, before = (
        load_file(folder / "routers.safetensors") for folder in (one, two, routed_folder if start == "routed" else one)
    )
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-5)
    if start == "routed":
        assert any(not actual[name].equal(before[name]) for name in actual)
    else:
        assert all(actual[f"adapters.{layer}.up.weight"].any() for layer in range(3))
    reports = [read_report(folder)["training"] for folder in (one, two)]
    for line, other in zip(*(report["history"] for report in reports), strict=True):
        for name in ("lm_loss", "active_ratio", "eval_lm_loss", "eval_active_ratio", "eval_distill_loss", "loss"):
            assert (name in line) == (name in other)
            if name in line:
                assert other[name] == pytest.approx(line[name], rel=1e-3)


def test_two_processes_learn_to_the_second_order(routed_folder: Path, train_file: Path, tmp_path: Path) -> None:
    """Labels are drawn in each, so no more can be asked than that it is another training than that of first order."""
    trained = []
    for order in ("first_order", "second_order"):
        output = tmp_path / order
        argv = [
            "--model_name_or_path",
            str(routed_folder),
            "--train_file",
            str(train_file),
            "--output_dir",
            str(output),
        ]
        argv += ["--sequence_length", "16", "--max_train_steps", "1", "--learning_rate", "0.05", "--use_cpu"]
        argv += ["--per_device_train_batch_size", "2", "--gate_gradient", order]
        _train_in_two_processes(argv)
        trained.append(load_file(output / "routers.safetensors"))
    first, second = trained
    assert all(values.isfinite().all() for values in second.values())
    assert any(not torch.equal(first[name], second[name]) for name in first)


def test_a_model_is_rewritten_in_one_process(base_folder: Path, tmp_path: Path) -> None:
    result = _in_two_processes("modcompile.rewrite", [str(base_folder), "--output_dir", str(tmp_path / "out")])
    assert result.returncode != 0
    said = "modcompile.rewrite works in one process; give torchrun -m modcompile.train the model and the same flags"
    assert said in result.stderr
    assert not (tmp_path / "out").exists()
