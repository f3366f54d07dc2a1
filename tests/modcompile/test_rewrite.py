import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from modcompile import load_with_routers
from modcompile.artifacts import read_report, read_router_config
from modcompile.cli import run
from modcompile.config import RouterConfig
from modcompile.rewrite import main
from tests.folder_contents import contents
from tests.tiny_models import tiny_model

_TRAINED = ("--dataset_name", "builtin", "--sequence_length", "16")
_STATIC = ("--static_selection_samples", "4", "--skip_adapter", "low_rank")


@pytest.fixture(autouse=True)
def _in_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What has a default place is written to the current folder."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


def _error(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What the command says before it exits with status 2; progress of what takes seconds set aside."""
    assert run(lambda: main(argv)) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.endswith("…")]
    assert len(lines) == 1
    return lines[0]


def _run_module(*argv: str) -> "subprocess.CompletedProcess[str]":
    root = str(Path(__file__).parents[2])
    return subprocess.run(
        [sys.executable, "-m", "modcompile.rewrite", *argv],
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )


def test_writes_a_model_that_is_the_dense_one_until_it_is_trained(base_folder: Path) -> None:
    before = contents(base_folder)
    result = _run_module(str(base_folder), "--lock_last_layers", "1")
    assert result.returncode == 0, result.stderr
    assert "trainable: " in result.stdout
    assert "untrained: run hard it is the dense model" in result.stdout
    assert contents(base_folder) == before
    assert [path.name for path in Path().iterdir()] == ["tiny-routed"]
    after = contents(Path("tiny-routed"))
    assert after["model.safetensors"] == before["model.safetensors"]
    assert after.keys() - before.keys() == {"routers.safetensors", "router_config.json", "report.json"}
    assert read_router_config(Path("tiny-routed")) == RouterConfig(lock_last_layers=1)

    tokenizer = AutoTokenizer.from_pretrained("tiny-routed")
    dense: Any = AutoModelForCausalLM.from_pretrained("tiny-routed")
    model = load_with_routers("tiny-routed", hard_threshold=0.5)
    prompt = tokenizer("hello", return_tensors="pt").input_ids
    options = {"max_new_tokens": 10, "do_sample": False}
    assert torch.equal(model.generate(prompt, **options), dense.generate(prompt, **options))
    assert model.active_ratio == 1


def test_seed_decides_where_routers_start_and_they_are_replaced_until_trained(base_folder: Path) -> None:
    hashes = []
    for seed in ("1", "1", "2"):
        main([str(base_folder), "--output_dir", "out", "--seed", seed])
        hashes.append(contents(Path("out"))["routers.safetensors"])
    assert hashes[0] == hashes[1] != hashes[2]


def test_takes_a_routed_folder_as_the_model_in_it(routed_folder: Path) -> None:
    main([str(routed_folder), "--output_dir", "out"])
    assert contents(Path("out"))["model.safetensors"] == contents(routed_folder)["model.safetensors"]
    assert read_router_config(Path("out")) == RouterConfig()


def test_overwrites_a_foreign_folder_when_told_so(base_folder: Path) -> None:
    Path("out").mkdir()
    Path("out", "thesis.txt").touch()
    main([str(base_folder), "--output_dir", "out", "--overwrite_output_dir"])
    assert "thesis.txt" not in contents(Path("out"))


@pytest.mark.slow
def test_rewrites_trains_and_exports_in_one_go(base_folder: Path) -> None:
    flags = [
        "--dataset_name",
        "builtin",
        "--sequence_length",
        "32",
        "--max_train_samples",
        "8",
        "--max_eval_samples",
        "4",
    ]
    flags += ["--max_train_steps", "2", "--router_lambda", "3", "--hard_threshold", "0.4", "--emit_routing"]
    main([str(base_folder), "--output_dir", "out", *flags, "--export"])
    report = read_report(Path("out"))
    assert set(report) == {"rewrite", "training", "export"}
    assert report["training"]["steps"] == 2
    exported = Path("out", "onnx")
    assert {"model.onnx", "model.onnx.data", "config.json", "tokenizer.json", "verification.json"} <= {
        path.name for path in exported.iterdir()
    }
    assert json.loads((exported / "verification.json").read_text())["passed"]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--router_start", "3"], "--router_start 3 --router_stop 3"),
        (["--router_start", "2", "--router_stop", "1"], "--router_start 2 --router_stop 1"),
        (["--router_stop", "4"], "--router_stop 4"),
        (["--lock_first_layers", "3"], "no layer is left to route"),
        (["--router_dropout", "nan"], "--router_dropout is nan"),
        (["--target_active_ratio", "-0.1"], "--target_active_ratio is -0.1"),
        (["--router_lambda", "nan"], "--router_lambda is nan"),
        (["--hard_threshold", "nan"], "--hard_threshold is nan"),
        (["--hard_threshold", "-1"], "--hard_threshold is -1"),
        (["--train_file", "none.txt", "--sequence_length", "16"], "none.txt does not exist"),
        (["--train_file", "one.txt", "--sequence_length", "16"], "fewer than two tokens"),
        (["--dataset_name", "builtin"], "--sequence_length 512 is above the 128 positions"),
        (["--resume_from_checkpoint", "true"], "python -m modcompile.train"),
        (["--max_train_steps", "2"], "--max_train_steps asks for a training, but there is no data; add, say, "),
        (["--router_start_samples", "4"], "--router_start_samples asks for a training"),
        (["--router_lambda", "3"], "--router_lambda asks for a training"),
        (["--distill_weight", "1"], "--distill_weight asks for a training"),
        (["--export", "--hard_threshold", "auto"], "--hard_threshold auto is calibrated after a training"),
        ([*_TRAINED, "--gate", "soft", "--gate_gradient", "second_order"], "--gate is soft; make it straight_through"),
        ([*_TRAINED, *_STATIC, "--gate_gradient", "second_order"], "--gate_gradient is for gates that learn"),
        ([*_TRAINED, *_STATIC[:2]], "there are none; add --skip_adapter low_rank"),
        (["--router_pattern", "most"], "--router_pattern"),
    ],
)
def test_bad_input_is_one_line_and_nothing_written(
    base_folder: Path, capsys: pytest.CaptureFixture[str], flags: list[str], says: str
) -> None:
    Path("one.txt").write_text("a")
    assert says in _error([str(base_folder), "--output_dir", "out", *flags], capsys)
    assert [path.name for path in Path().iterdir()] == ["one.txt"]


def _tiny_bert() -> PreTrainedModel:
    return BertForMaskedLM(
        BertConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=96)
    )


def _tiny_t5() -> PreTrainedModel:
    config = T5Config(d_model=32, d_ff=48, d_kv=8, num_layers=2, num_heads=4, vocab_size=96)
    config.decoder_start_token_id = 0
    return T5ForConditionalGeneration(config)


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("encoder", "is an encoder: its logits depend on later tokens"),
        ("encoder-decoder", "is an encoder-decoder (t5)"),
        ("one layer", "no list of two or more decoder layers"),
    ],
)
def test_refuses_what_is_no_stack_of_decoder_blocks(capsys: pytest.CaptureFixture[str], kind: str, says: str) -> None:
    model = {"encoder": _tiny_bert, "encoder-decoder": _tiny_t5, "one layer": lambda: tiny_model("llama", 1)}[kind]()
    model.save_pretrained("model")
    capsys.readouterr()
    assert says in _error(["model", "--output_dir", "out"], capsys)
    assert not Path("out").exists()


def test_keeps_what_is_not_its_own(base_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("out").mkdir()
    Path("out", "thesis.txt").write_text("years of work")
    assert "was not made by modcompile" in _error([str(base_folder), "--output_dir", "out"], capsys)
    assert contents(Path("out")).keys() == {"thesis.txt"}
    Path("file").touch()
    assert "file is a file" in _error([str(base_folder), "--output_dir", "file"], capsys)


def test_bad_input_from_a_shell(base_folder: Path) -> None:
    for argv in (("no/such/folder",), (str(base_folder), "--router_start", "x")):
        result = _run_module(*argv)
        assert result.returncode == 2
        assert result.stdout == ""
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1
    assert list(Path().iterdir()) == []
