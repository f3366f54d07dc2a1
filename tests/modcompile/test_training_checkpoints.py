from pathlib import Path

import pytest

from modcompile.errors import ArtifactError
from modcompile.training_checkpoints import find_training_checkpoint, training_checkpoints


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three checkpoints, of which the last was cut short, and what looks like one."""
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-100", "checkpoint-best", "onnx"):
        (tmp_path / name).mkdir()
    for name in ("checkpoint-9", "checkpoint-10"):
        (tmp_path / name / "trainer_state.json").write_text('{"global_step": 1}')
    (tmp_path / "checkpoint-11").touch()
    return tmp_path


def test_lists_them_in_the_order_of_their_steps(folder: Path) -> None:
    assert [path.name for path in training_checkpoints(folder)] == ["checkpoint-9", "checkpoint-10", "checkpoint-100"]
    assert training_checkpoints(folder / "onnx") == []
    assert training_checkpoints(folder / "nothing") == []


@pytest.mark.parametrize("wanted", ["true", "True"])
def test_true_is_the_last_whole_one(folder: Path, wanted: str) -> None:
    assert find_training_checkpoint(folder, wanted) == folder / "checkpoint-10"


@pytest.mark.parametrize("text", ["", '{"global_step": ', "[]"])
def test_one_with_a_state_cut_short_is_not_whole(folder: Path, text: str) -> None:
    (folder / "checkpoint-10" / "trainer_state.json").write_text(text)
    assert find_training_checkpoint(folder, "true") == folder / "checkpoint-9"
    with pytest.raises(ArtifactError, match="checkpoint-10 is no whole checkpoint"):
        find_training_checkpoint(folder, str(folder / "checkpoint-10"))


def test_a_path_is_taken_as_it_is(folder: Path, tmp_path: Path) -> None:
    assert find_training_checkpoint(tmp_path / "elsewhere", str(folder / "checkpoint-9")) == folder / "checkpoint-9"


def test_refuses_a_folder_without_one(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="holds no checkpoint"):
        find_training_checkpoint(tmp_path, "true")
    with pytest.raises(ArtifactError, match=r"checkpoint-7 is not the folder of a checkpoint; give one, or `true`"):
        find_training_checkpoint(tmp_path, str(tmp_path / "checkpoint-7"))
