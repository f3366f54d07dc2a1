import json
import math
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from safetensors.torch import load_file
from transformers import LlamaConfig, PreTrainedTokenizerFast

from modcompile.artifacts import load_with_routers, read_report, update_report
from modcompile.config import BudgetConfig
from modcompile.data_config import DataConfig
from modcompile.depth_training import DepthTraining
from modcompile.errors import ArtifactError, ConfigError, DataError, ModcompileError
from modcompile.loss_config import LossConfig
from modcompile.training import load_training_blocks, train_routers
from modcompile.training_arguments import RouterTrainingArguments
from tests.folder_contents import contents

_DEPTH = DepthTraining(BudgetConfig(router_lambda=2.0, target_active_ratio=0.1), LossConfig())
_RESULTS = {"routers.safetensors", "report.json", "training_history.png"}


@pytest.fixture(scope="module")
def blocks() -> DatasetDict:
    torch.manual_seed(0)
    ids = torch.randint(3, 300, (12, 10)).tolist()
    rows = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * 10] * 12, "labels": ids})
    return DatasetDict(train=rows.select(range(8)), validation=rows.select(range(8, 12)))


@pytest.fixture
def folder(routed_folder: Path, tmp_path: Path) -> Path:
    """A routed folder to train in."""
    return Path(shutil.copytree(routed_folder, tmp_path / "routed"))


def _arguments(**options: Any) -> RouterTrainingArguments:
    defaults = {"max_train_steps": 2, "logging_steps": 1, "disable_tqdm": True, "per_device_train_batch_size": 4}
    return RouterTrainingArguments(**(defaults | options))


def test_trains_in_place_and_changes_the_routers_only(folder: Path, blocks: DatasetDict) -> None:
    before, routers = contents(folder), load_file(folder / "routers.safetensors")
    train_routers(folder, folder, blocks, _DEPTH, _arguments())
    after, trained = contents(folder), load_file(folder / "routers.safetensors")
    checkpoint = {name for name in after if name.startswith("checkpoint-2/")}
    assert {name for name in after if after[name] != before.get(name)} - checkpoint == _RESULTS
    assert trained.keys() == routers.keys()
    assert all(not torch.equal(trained[name], routers[name]) for name in routers)
    loaded = load_with_routers(folder)
    for layer, router in loaded.routers.items():
        for name, tensor in router.state_dict().items():
            assert torch.equal(tensor, trained[f"routers.{layer}.{name}"])


def test_trains_in_a_copy(folder: Path, blocks: DatasetDict, tmp_path: Path) -> None:
    update_report(folder, "rewrite", {"model": "tiny"})
    before = contents(folder)
    train_routers(folder, tmp_path / "out", blocks, _DEPTH, _arguments(save_strategy="no"))
    assert contents(folder) == before
    after = contents(tmp_path / "out")
    assert {name for name in after if after[name] != before.get(name)} == _RESULTS
    assert set(after) == set(before) | {"training_history.png"}
    assert set(read_report(tmp_path / "out")) == {"rewrite", "training"}


def test_report_tells_of_the_training(folder: Path, blocks: DatasetDict, capsys: pytest.CaptureFixture[str]) -> None:
    returned = train_routers(folder, folder, blocks, _DEPTH, _arguments(save_strategy="no"))
    stdout = capsys.readouterr().out
    report = json.loads((folder / "report.json").read_text())["training"]
    assert report["budget"] == asdict(BudgetConfig(router_lambda=2.0, target_active_ratio=0.1))
    assert report["steps"] == 2
    assert report["parameters"]["trainable"] == 2 * (32 + 32 + 32 * 8 + 8 + 1)
    metrics = report["metrics"]
    assert metrics == returned
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(metrics["eval_lm_loss"]))
    assert metrics["eval_loss"] == pytest.approx(metrics["eval_lm_loss"] + 2.0 * metrics["eval_budget_loss"])
    assert 0 < metrics["eval_active_ratio"] <= 1
    steps = [line for line in report["history"] if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2]
    assert all({"lm_loss", "active_ratio", "budget_loss", "learning_rate"} <= line.keys() for line in steps)
    # What a user sees: the trainable share, and a line of metrics for each step.
    assert "2 routed layers; trainable: 658 of 43,122 parameters" in stdout
    lines = [line for line in stdout.splitlines() if "'lm_loss'" in line and "'eval_loss'" not in line]
    assert len(lines) == 2
    assert all("'active_ratio'" in line and "'budget_loss'" in line for line in lines)


def test_seed_decides(folder: Path, blocks: DatasetDict, tmp_path: Path) -> None:
    trained = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        arguments = _arguments(seed=seed, save_strategy="no")
        train_routers(folder, tmp_path / name, blocks, _DEPTH, arguments)
        trained.append(contents(tmp_path / name)["routers.safetensors"])
    assert trained[0] == trained[1] != trained[2]


def test_evaluation_in_half_precision_leaves_the_routers_whole(folder: Path, blocks: DatasetDict) -> None:
    train_routers(folder, folder, blocks, _DEPTH, _arguments(bf16_full_eval=True, save_strategy="no"))
    stored = load_file(folder / "routers.safetensors").values()
    assert {tensor.dtype for tensor in stored} == {torch.float32}
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in stored)


def test_removes_the_checkpoints_of_an_earlier_training(folder: Path, blocks: DatasetDict) -> None:
    for name in ("checkpoint-2", "checkpoint-900", "checkpoint-best"):
        (folder / name).mkdir()
        (folder / name / "trainer_state.json").write_text("{}")
    train_routers(folder, folder, blocks, _DEPTH, _arguments(save_strategy="no"))
    assert {path.name for path in folder.glob("checkpoint-*")} == {"checkpoint-best"}


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_resumes_exactly(folder: Path, blocks: DatasetDict, tmp_path: Path, dropout: float) -> None:
    config = json.loads((folder / "router_config.json").read_text())
    config["routers"]["router_dropout"] = dropout
    (folder / "router_config.json").write_text(json.dumps(config))
    arguments = {"max_train_steps": 6, "save_steps": 3}
    whole = train_routers(folder, tmp_path / "whole", blocks, _DEPTH, _arguments(**arguments))
    resumed = tmp_path / "resumed"
    shutil.copytree(folder, resumed)
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", resumed / "checkpoint-3")
    torch.manual_seed(9)
    metrics = train_routers(resumed, resumed, blocks, _DEPTH, _arguments(**arguments, resume_from_checkpoint="true"))
    assert contents(resumed)["routers.safetensors"] == contents(tmp_path / "whole")["routers.safetensors"]
    assert metrics["eval_loss"] == whole["eval_loss"]
    assert [line["step"] for line in read_report(resumed)["training"]["history"] if "loss" in line] == [*range(1, 7)]


@pytest.mark.parametrize("resume", ["true", "no/such/checkpoint"])
def test_refuses_to_resume_from_nothing(folder: Path, blocks: DatasetDict, resume: str) -> None:
    before = contents(folder)
    with pytest.raises(ArtifactError, match="checkpoint"):
        train_routers(folder, folder, blocks, _DEPTH, _arguments(resume_from_checkpoint=resume))
    assert contents(folder) == before


def _cut(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-100])


@pytest.mark.parametrize("name", ["routers.safetensors", "model.safetensors", "router_config.json"])
def test_writes_nothing_of_a_folder_that_is_damaged(
    folder: Path, blocks: DatasetDict, tmp_path: Path, name: str
) -> None:
    _cut(name)(folder)
    before = contents(tmp_path)
    with pytest.raises(ModcompileError, match=name):
        train_routers(folder, tmp_path / "out", blocks, _DEPTH, _arguments())
    assert contents(tmp_path) == before
    assert not (tmp_path / "out").exists()


def test_blocks_are_those_of_the_data_and_the_model(train_file: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    config = LlamaConfig(max_position_embeddings=32)
    blocks = load_training_blocks(DataConfig(train_file=str(train_file), sequence_length=32), tokenizer, config)
    assert set(blocks) == {"train", "validation"}
    assert blocks["train"].column_names == ["input_ids", "attention_mask", "labels"]
    assert len(blocks["train"][0]["input_ids"]) == 32
    with pytest.raises(ConfigError, match="--sequence_length 33 is above the 32 positions"):
        load_training_blocks(DataConfig(train_file=str(train_file), sequence_length=33), tokenizer, config)
    with pytest.raises(DataError, match="the model has no tokenizer"):
        load_training_blocks(DataConfig(train_file=str(train_file)), None, config)
    config = LlamaConfig(vocab_size=99)
    with pytest.raises(
        DataError, match=r"the text has the token \d+, but the model has 99: it was tokenized for another"
    ):
        load_training_blocks(DataConfig(train_file=str(train_file)), tokenizer, config)
