import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from modcompile.errors import ArtifactError, CheckpointError, ConfigError, ModcompileError, OutputError
from modcompile.precision_config import QuantizationConfig
from modcompile.quantized_folder import (
    QuantizedCheckpoint,
    copy_quantized_folder,
    is_quantized_folder,
    read_quantized_folder,
    write_quantized_folder,
)
from modcompile.quantizing import quantize_base
from modcompile.version import __version__
from tests.folder_contents import contents
from tests.tiny_models import tiny_model
from tests.tiny_routed import tiny_base

_WEIGHT = "model.layers.0.mlp.up_proj.weight"
_CONFIG = "quantization_config.json"


def _checkpoint(*precisions: int) -> QuantizedCheckpoint:
    return quantize_base(tiny_base(), QuantizationConfig(precisions=list(precisions), group_size=32, method="rtn"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("quantized") / "folder"
    write_quantized_folder(_checkpoint(4, 8, 16), None, path)
    return path


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    """A folder to damage."""
    return Path(shutil.copytree(folder, tmp_path / "quantized"))


def test_with_the_original_weights_it_loads_without_modcompile(folder: Path) -> None:
    assert set(contents(folder)) == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "quantization_config.json",
        "quantized.safetensors",
    }
    assert is_quantized_folder(folder)
    assert json.loads((folder / _CONFIG).read_text())["modcompile_version"] == __version__
    base = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(base.state_dict(), tiny_base().state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("precisions", [None, (4,), (8, 4), (8,), (4, 16)])
def test_reads_what_was_written(folder: Path, precisions: tuple[int, ...] | None) -> None:
    expected = _checkpoint(4, 8, 16)
    read = read_quantized_folder(folder, precisions)
    assert read.config.precisions == (sorted(precisions) if precisions else [4, 8, 16])
    assert read.transposed == expected.transposed
    assert read.weights.keys() == expected.weights.keys()
    for name, weight in expected.weights.items():
        assert read.weights[name].in_features == weight.in_features
        for precision in (4, 8):
            assert torch.equal(read.weights[name].dequantize(precision), weight.dequantize(precision))


@pytest.mark.parametrize("precision", [4, 8, 16])
def test_the_base_has_the_highest_precision_asked_for(folder: Path, precision: int) -> None:
    read = read_quantized_folder(folder, [4, precision] if precision != 4 else [4])
    state, original = read.base.state_dict(), tiny_base().state_dict()
    for name, tensor in state.items():
        dense = name not in read.weights or precision == 16
        expected = original[name] if dense else read.weights[name].dequantize(precision)
        assert torch.equal(tensor, expected)
    assert not read.base.training


def test_without_the_original_weights_they_are_not_stored(tmp_path: Path) -> None:
    write_quantized_folder(_checkpoint(4, 8), None, tmp_path / "folder")
    assert _WEIGHT not in load_file(tmp_path / "folder" / "model.safetensors")
    read = read_quantized_folder(tmp_path / "folder")
    assert torch.equal(read.base.get_parameter(_WEIGHT), read.weights[_WEIGHT].dequantize(8))
    with pytest.raises(ConfigError, match="has no weights of 16 bits; it has 4, 8"):
        read_quantized_folder(tmp_path / "folder", [8, 16])


@pytest.mark.parametrize("precisions", [[8], [8, 16]])
def test_weights_that_lie_the_other_way_round_come_back_so(tmp_path: Path, precisions: list[int]) -> None:
    base = tiny_model("gpt2")
    checkpoint = quantize_base(base, QuantizationConfig(precisions=precisions, group_size=32, method="rtn"))
    write_quantized_folder(checkpoint, None, tmp_path / "folder")
    read = read_quantized_folder(tmp_path / "folder")
    assert read.transposed == read.weights.keys() != set()
    for name in read.weights:
        original, restored = base.get_parameter(name).detach(), read.base.get_parameter(name)
        assert restored.shape == original.shape
        assert float((restored - original).norm() / original.norm()) < 0.02


@pytest.mark.parametrize("precisions", [[3], [4, 12], []])
def test_names_the_precisions_that_there_are(folder: Path, precisions: list[int]) -> None:
    with pytest.raises(ConfigError, match="it has 4, 8, 16"):
        read_quantized_folder(folder, precisions)


def test_never_replaces_what_is_not_ours(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "text").write_text("mine")
    with pytest.raises(OutputError, match="was not made by modcompile"):
        write_quantized_folder(_checkpoint(4), None, tmp_path / "notes")
    assert set(contents(tmp_path)) == {"notes/text"}


def _without(name: str) -> Any:
    return lambda folder: (folder / name).unlink()


def _cut(name: str, size: int) -> Any:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def _flip(name: str) -> Any:
    """A byte of the header, behind its length and the bracket that opens it."""

    def damage(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[12] ^= 0xFF
        (folder / name).write_bytes(bytes(data))

    return damage


def _stored(change: Any) -> Any:
    def damage(folder: Path) -> None:
        stored = json.loads((folder / _CONFIG).read_text())
        change(stored)
        (folder / _CONFIG).write_text(json.dumps(stored))

    return damage


def _tensors(change: Any) -> Any:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / "quantized.safetensors")
        change(tensors)
        save_file(tensors, folder / "quantized.safetensors")

    return damage


def _keep_rows(rows: int, *precisions: int) -> Any:
    """All tensors of these precisions of a weight lose the same rows: each precision is sound on its own."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for precision in precisions:
            for kind in ("packed", "scales", "zero_points"):
                name = f"{_WEIGHT}.{precision}.{kind}"
                tensors[name] = tensors[name][:rows].contiguous()

    return _tensors(change)


def _rename(name: str, other: str) -> Any:
    def rename_tensors(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in tensors if key.startswith(name)]:
            tensors[other + key.removeprefix(name)] = tensors.pop(key)

    def damage(folder: Path) -> None:
        _tensors(rename_tensors)(folder)
        _stored(lambda stored: stored["weights"].update({other: stored["weights"].pop(name)}))(folder)

    return damage


@pytest.mark.parametrize(
    ("damage", "error", "says"),
    [
        (shutil.rmtree, ArtifactError, "is not a folder"),
        (_without(_CONFIG), ArtifactError, f"has no {_CONFIG}"),
        (_without("quantized.safetensors"), ArtifactError, "quantized.safetensors can't be read"),
        (_without("model.safetensors"), ArtifactError, "model.safetensors can't be read"),
        (_without("config.json"), CheckpointError, "has no config.json"),
        (_cut(_CONFIG, 20), ArtifactError, "is damaged"),
        (_cut("quantized.safetensors", 200), ArtifactError, "quantized.safetensors can't be read"),
        (_cut("quantized.safetensors", -4), ArtifactError, "quantized.safetensors can't be read"),
        (_flip("quantized.safetensors"), ArtifactError, "quantized.safetensors can't be read"),
        (
            _stored(lambda s: s.update(format_version=2)),
            ArtifactError,
            "has format 2, this modcompile .* reads format 1",
        ),
        (_stored(lambda s: s.pop("weights")), ArtifactError, "is damaged"),
        (_stored(lambda s: s.update(weights=[1])), ArtifactError, "is damaged"),
        (_stored(lambda s: s["quantization"].update(group_size=7)), ArtifactError, "is damaged .*--group_size is 7"),
        (_stored(lambda s: s["quantization"].update(bits=3)), ArtifactError, "is damaged"),
        (_tensors(lambda t: t.pop(f"{_WEIGHT}.4.scales")), ArtifactError, f"lacks {_WEIGHT}.4.scales"),
        (
            _tensors(lambda t: t.update({f"{_WEIGHT}.4.scales": t[f"{_WEIGHT}.4.scales"].half()})),
            ArtifactError,
            f"{_WEIGHT}.4.scales is torch.float16",
        ),
        (
            _tensors(lambda t: t.update({f"{_WEIGHT}.8.packed": t[f"{_WEIGHT}.8.packed"][..., :8].contiguous()})),
            ArtifactError,
            rf"{_WEIGHT}.8.packed is torch.uint8 \[48, 1, 8\], not torch.uint8 \[out features, 1, 16\]",
        ),
        (
            _tensors(lambda t: t.update({f"{_WEIGHT}.8.packed": t[f"{_WEIGHT}.8.packed"][1:].contiguous()})),
            ArtifactError,
            f"the parts of {_WEIGHT}.8 differ in length",
        ),
        (_keep_rows(47, 8), ArtifactError, f"the parts of {_WEIGHT} differ in length"),
        (_keep_rows(1, 8), ArtifactError, f"the parts of {_WEIGHT} differ in length"),
        (_keep_rows(47, 4, 8), ArtifactError, rf"{_WEIGHT} is \[47, 32\], not \[48, 32\] as in the base"),
        (
            _stored(lambda s: s["weights"].update({_WEIGHT: 31})),
            ArtifactError,
            rf"{_WEIGHT} is \[48, 31\], not \[48, 32\] as in the base",
        ),
        (
            _stored(lambda s: s["transposed"].append(_WEIGHT)),
            ArtifactError,
            rf"{_WEIGHT} is \[48, 32\], not \[32, 48\] as in the base",
        ),
        (_stored(lambda s: s["weights"].pop(_WEIGHT)), ArtifactError, f"{_WEIGHT}.4.packed, of which {_CONFIG} knows"),
        (_stored(lambda s: s["weights"].clear()), ArtifactError, f"{_CONFIG} names no weights"),
        (_rename(_WEIGHT, "model.up.weight"), ArtifactError, "names model.up.weight, which LlamaForCausalLM has not"),
        (
            _tensors(lambda t: t[f"{_WEIGHT}.4.scales"].fill_(float("nan"))),
            ArtifactError,
            f"{_WEIGHT}.4.scales holds NaN",
        ),
    ],
)
def test_says_what_is_wrong_with_a_folder(copied: Path, damage: Any, error: type[ModcompileError], says: str) -> None:
    damage(copied)
    with pytest.raises(error, match=says):
        read_quantized_folder(copied)


def test_original_weights_alone_are_held_against_the_base_too(tmp_path: Path) -> None:
    write_quantized_folder(_checkpoint(16), None, tmp_path / "folder")
    assert not any(weight.parts for weight in read_quantized_folder(tmp_path / "folder").weights.values())
    _stored(lambda stored: stored["weights"].update({_WEIGHT: 31}))(tmp_path / "folder")
    with pytest.raises(ArtifactError, match=rf"{_WEIGHT} is \[48, 31\], not \[48, 32\]"):
        read_quantized_folder(tmp_path / "folder")


def test_copies_all_but_plots_and_checkpoints(copied: Path, tmp_path: Path) -> None:
    (copied / "precision_routers.safetensors").write_text("routers")
    expected = contents(copied)
    (copied / "training_choices.png").touch()
    (copied / "checkpoint-3").mkdir()
    (copied / "checkpoint-3" / "file").touch()
    copy_quantized_folder(copied, tmp_path / "copy")
    assert contents(tmp_path / "copy") == expected
