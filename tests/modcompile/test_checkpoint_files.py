import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from modcompile.checkpoint_files import check_gguf, check_weights, read_config
from modcompile.errors import CheckpointError


def _save(path: Path, **tensors: torch.Tensor) -> None:
    save_file(tensors, path, metadata={"format": "pt"})


def test_reads_a_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": 8}')
    assert read_config(tmp_path) == {"model_type": "llama", "hidden_size": 8}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"{'model_type': 'llama'}", "is not JSON"),
        (b"", "is not JSON"),
        (b'{"model_type": "ll\xff"}', "is not JSON"),
        (b'["llama"]', "holds no JSON object"),
        (b'{"hidden_size": 8}', 'does not name its "model_type"'),
        (b'{"model_type": null}', 'does not name its "model_type"'),
    ],
)
def test_refuses_a_config_that_is_none(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=f"config.json {reason}"):
        read_config(tmp_path)


def test_says_what_to_give_instead_of_a_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no config.json; give the folder that holds config.json"):
        read_config(tmp_path)
    (tmp_path / "tiny.gguf").touch()
    with pytest.raises(CheckpointError, match=r"has no config.json; give the file itself, .*/tiny.gguf"):
        read_config(tmp_path)


def test_lists_the_stored_dtypes_of_one_file_or_of_several(tmp_path: Path) -> None:
    half, counts = torch.zeros(2, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.int32)
    _save(tmp_path / "a.safetensors", half=half)
    _save(tmp_path / "b.safetensors", counts=counts)
    weight_map = {"half": "a.safetensors", "counts": "b.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert check_weights(tmp_path) == {"half": "BF16", "counts": "I32"}
    _save(tmp_path / "model.safetensors", half=half)
    assert check_weights(tmp_path) == {"half": "BF16"}


def test_refuses_a_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no weights; it needs model.safetensors"):
        check_weights(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_refuses_pickles_unread(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"whatever")
    with pytest.raises(CheckpointError, match=rf"pickle files only \({name}\).* can run any code; convert them"):
        check_weights(tmp_path)


def test_ignores_pickles_beside_safetensors(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"whatever")
    _save(tmp_path / "model.safetensors", weight=torch.zeros(2))
    assert check_weights(tmp_path) == {"weight": "F32"}


@pytest.mark.parametrize(
    ("index", "reason"),
    [
        ("[", "index.json is not JSON"),
        ("{}", 'index.json has no "weight_map"'),
        ('{"weight_map": {}}', 'index.json has no "weight_map"'),
        ('{"weight_map": {"w": "model-00001-of-00002.safetensors"}}', "model-00001-of-00002.safetensors is missing"),
    ],
)
def test_refuses_an_index_that_does_not_lead_to_weights(tmp_path: Path, index: str, reason: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=reason):
        check_weights(tmp_path)


def test_refuses_weights_cut_short_anywhere(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    _save(path, first=torch.zeros(4, 4), second=torch.zeros(8))
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r"model.safetensors is damaged or cut short"):
            check_weights(tmp_path)


def test_refuses_garbage_by_the_name_of_weights(tmp_path: Path) -> None:
    for content in (b"<html>not found</html>" * 10, b"\xff" * 1000, b"\0" * 1000):
        (tmp_path / "model.safetensors").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"model.safetensors is damaged or cut short"):
            check_weights(tmp_path)


@pytest.mark.parametrize("content", [b"", b"GGU", b"PK\3\4 a zip file"])
def test_refuses_what_is_only_called_gguf(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"tiny.gguf is not a GGUF file, whatever its name"):
        check_gguf(path)


def test_refuses_a_gguf_file_that_is_gone(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tiny.gguf can't be read \(No such file or directory\)"):
        check_gguf(tmp_path / "tiny.gguf")
