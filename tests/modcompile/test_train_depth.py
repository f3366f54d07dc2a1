import shutil
from pathlib import Path

import pytest

from modcompile.artifacts import read_router_config
from modcompile.config import BudgetConfig, RouterConfig
from modcompile.data_config import DataConfig
from modcompile.errors import ConfigError, DataError, OutputError
from modcompile.loss_config import LossConfig
from modcompile.start_config import StartConfig
from modcompile.train_depth import train_depth
from modcompile.training_arguments import RouterTrainingArguments
from tests.folder_contents import contents

_ROUTER = RouterConfig(router_hidden_size=8, router_pattern="every_other")
_LEARNING = (BudgetConfig(), LossConfig(), StartConfig())


def _arguments(output: Path | None, *, resume: str | None = None) -> RouterTrainingArguments:
    return RouterTrainingArguments(
        output_dir=None if output is None else str(output),
        max_train_steps=1,
        resume_from_checkpoint=resume,
        save_steps=1,
        disable_tqdm=True,
    )


@pytest.fixture
def data(train_file: Path) -> DataConfig:
    return DataConfig(train_file=str(train_file), sequence_length=16, max_eval_samples=1)


def test_goes_on_only_with_the_routers_that_are_there(
    base_folder: Path, routed_folder: Path, data: DataConfig, tmp_path: Path
) -> None:
    """Flags of routers may be left out, or say what the folder holds."""
    other = RouterConfig(router_hidden_size=9)
    out = tmp_path / "out"
    assert train_depth(str(routed_folder), _ROUTER, *_LEARNING, data, _arguments(out)) == out
    assert read_router_config(out) == _ROUTER
    before = contents(out)
    with pytest.raises(ConfigError, match=r"out has routers of its own .*; leave the router flags out"):
        train_depth(str(base_folder), other, *_LEARNING, data, _arguments(out, resume="true"))
    assert contents(out) == before
    # Of a training that is over, nothing is left to do.
    train_depth(str(base_folder), RouterConfig(), *_LEARNING, data, _arguments(out, resume="true"))
    assert contents(out)["routers.safetensors"] == before["routers.safetensors"]


def test_keeps_the_checkpoints_of_a_training_that_was_cut_short(
    routed_folder: Path, data: DataConfig, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(routed_folder, tmp_path / "folder"))
    (folder / "checkpoint-1").mkdir()
    for model in (folder, routed_folder):
        with pytest.raises(OutputError, match="holds trained routers"):
            train_depth(str(model), RouterConfig(), *_LEARNING, data, _arguments(folder))
    assert (folder / "checkpoint-1").is_dir()


@pytest.mark.parametrize(
    ("router", "start", "message"),
    [
        (RouterConfig(gate="soft"), StartConfig(), "--gate is soft; make it straight_through, or leave"),
        (RouterConfig(skip_adapter="low_rank"), StartConfig(static_selection_samples=2), "is for gates that learn"),
    ],
)
def test_gates_that_are_not_hard_or_do_not_learn_have_no_second_order(
    base_folder: Path, data: DataConfig, tmp_path: Path, router: RouterConfig, start: StartConfig, message: str
) -> None:
    loss = LossConfig(gate_gradient="second_order")
    with pytest.raises(ConfigError, match=message):
        train_depth(str(base_folder), router, BudgetConfig(), loss, start, data, _arguments(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["base", "routed"])
def test_a_model_without_a_tokenizer_writes_nothing(
    base_folder: Path, routed_folder: Path, data: DataConfig, tmp_path: Path, kind: str
) -> None:
    folder = Path(shutil.copytree(base_folder if kind == "base" else routed_folder, tmp_path / "folder"))
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(DataError, match="the model has no tokenizer"):
        train_depth(str(folder), RouterConfig(), *_LEARNING, data, _arguments(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
