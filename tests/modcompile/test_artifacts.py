import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from modcompile.artifacts import (
    base_files,
    copy_routed_folder,
    has_trained_routers,
    is_routed_folder,
    load_with_routers,
    read_report,
    read_router_config,
    update_report,
    write_routed_folder,
)
from modcompile.errors import ArtifactError, CheckpointError, ConfigError, ModcompileError, OutputError
from modcompile.version import __version__
from tests.folder_contents import contents
from tests.tiny_routed import tiny_adapted, tiny_decided_at_once, tiny_grouped, tiny_routed

_INPUT_IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]])


@pytest.fixture
def copied(routed_folder: Path, tmp_path: Path) -> Path:
    """A routed folder to damage."""
    return Path(shutil.copytree(routed_folder, tmp_path / "routed"))


def _edit_config(folder: Path, change: Any) -> None:
    path = folder / "router_config.json"
    stored = json.loads(path.read_text())
    change(stored)
    path.write_text(json.dumps(stored))


def test_folder_holds_base_tokenizer_and_routers(routed_folder: Path) -> None:
    # transformers 4.57 splits the tokenizer's files further.
    assert set(contents(routed_folder)) - {"special_tokens_map.json"} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "router_config.json",
        "routers.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    stored = json.loads((routed_folder / "router_config.json").read_text())
    assert stored["format_version"] == 1
    assert stored["modcompile_version"] == __version__
    assert is_routed_folder(routed_folder)


def test_base_loads_without_modcompile(routed_folder: Path) -> None:
    expected = tiny_routed("straight_through").base
    base = AutoModelForCausalLM.from_pretrained(routed_folder)
    assert type(base) is type(expected)
    torch.testing.assert_close(base.state_dict(), expected.state_dict(), rtol=0, atol=0)
    assert AutoTokenizer.from_pretrained(routed_folder).vocab_size == 300


@torch.no_grad()
def test_reads_adapters(tmp_path: Path) -> None:
    """A folder of before there were any has none."""
    expected = tiny_adapted("soft")
    expected.set_router_mode(None)
    write_routed_folder(expected, None, tmp_path / "routed")
    model = load_with_routers(tmp_path / "routed", None)
    assert len(model.adapters) == 3
    assert torch.equal(model(_INPUT_IDS).logits, expected(_INPUT_IDS).logits)
    copy_routed_folder(tmp_path / "routed", tmp_path / "copied")
    copied = load_with_routers(tmp_path / "copied", None)
    assert torch.equal(copied(_INPUT_IDS).logits, expected(_INPUT_IDS).logits)
    tiny_grouped("soft").set_router_mode(None)
    write_routed_folder(tiny_grouped("soft"), None, tmp_path / "older")
    for name in ("skip_adapter", "adapter_rank"):
        _edit_config(tmp_path / "older", lambda stored, name=name: stored["routers"].pop(name))
    assert not load_with_routers(tmp_path / "older").adapters


@torch.no_grad()
def test_reads_how_many_gates_are_decided_at_once(tmp_path: Path) -> None:
    """A folder of before there was a choice decides each by itself."""
    expected = tiny_decided_at_once("soft")
    expected.set_router_mode(None)
    write_routed_folder(expected, None, tmp_path / "routed")
    model = load_with_routers(tmp_path / "routed", None)
    assert model.router_config.gates_per_decision == 3
    assert torch.equal(model(_INPUT_IDS).logits, expected(_INPUT_IDS).logits)
    _edit_config(tmp_path / "routed", lambda stored: stored["routers"].pop("gates_per_decision"))
    older = load_with_routers(tmp_path / "routed", None)
    assert older.router_config.gates_per_decision == 1
    assert not torch.equal(older(_INPUT_IDS).logits, expected(_INPUT_IDS).logits)


@pytest.mark.parametrize(("threshold", "use_cache"), [(None, False), (0.5, True), ([0.3, 0.6], True)])
def test_loads_what_was_written(routed_folder: Path, threshold: float | list[float] | None, use_cache: bool) -> None:
    expected = tiny_routed("straight_through")
    expected.set_router_mode(threshold)
    model = load_with_routers(str(routed_folder), threshold, use_cache=use_cache)
    assert model.router_config == expected.router_config
    assert model.hard_thresholds == expected.hard_thresholds
    assert model.takes_cache == use_cache
    assert not model.training
    with torch.no_grad():
        assert torch.equal(model(_INPUT_IDS).logits, expected(_INPUT_IDS).logits)


def test_loads_hard_and_in_float32_unless_told_otherwise(routed_folder: Path) -> None:
    assert load_with_routers(routed_folder).hard_thresholds == [0.5, 0.5]
    model = load_with_routers(routed_folder, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.generate(_INPUT_IDS, max_new_tokens=2).shape == (2, 8)


@pytest.mark.parametrize("threshold", [-1.0, float("nan"), [0.5], [0.5, 0.5, 0.5]])
def test_refuses_a_threshold_that_is_none(routed_folder: Path, threshold: float | list[float]) -> None:
    with pytest.raises(ConfigError):
        load_with_routers(routed_folder, threshold)


def _without(name: str) -> Any:
    return lambda folder: (folder / name).unlink()


def _cut(name: str, size: int) -> Any:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def _write(name: str, text: str) -> Any:
    return lambda folder: (folder / name).write_text(text)


def _set(key: str, value: Any) -> Any:
    return lambda folder: _edit_config(folder, lambda stored: stored.update({key: value}))


def _set_router(key: str, value: Any) -> Any:
    return lambda folder: _edit_config(folder, lambda stored: stored["routers"].update({key: value}))


def _other_tensors(change: Any) -> Any:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / "routers.safetensors")
        change(tensors)
        save_file(tensors, folder / "routers.safetensors")

    return damage


@pytest.mark.parametrize(
    ("damage", "error", "says"),
    [
        (shutil.rmtree, ArtifactError, "is not a folder"),
        (_without("router_config.json"), ArtifactError, "has no router_config.json"),
        (_write("router_config.json", "{"), ArtifactError, "router_config.json is damaged"),
        (_write("router_config.json", "[]"), ArtifactError, "router_config.json is damaged"),
        (_write("router_config.json", "{}"), ArtifactError, "router_config.json is damaged"),
        (_set("format_version", 2), ArtifactError, "has format 2, this modcompile .* reads format 1"),
        (_set("format_version", None), ArtifactError, "has format None"),
        (_set("routers", None), ArtifactError, "router_config.json is damaged"),
        (_set_router("no_such_option", 1), ArtifactError, "router_config.json is damaged"),
        (_set_router("router_dropout", 7), ArtifactError, "router_config.json is damaged .*--router_dropout is 7"),
        (_set_router("router_stop", 9), ArtifactError, "does not fit the model beside it .*--router_stop 9"),
        (_without("routers.safetensors"), ArtifactError, "routers.safetensors can't be read"),
        (_cut("routers.safetensors", 0), ArtifactError, "routers.safetensors can't be read"),
        (_cut("routers.safetensors", 100), ArtifactError, "routers.safetensors can't be read"),
        (_cut("routers.safetensors", -4), ArtifactError, "routers.safetensors can't be read"),
        # Routers for layers that this folder does not route, none for one that it does, and another width.
        (_set_router("router_pattern", "all"), ArtifactError, r"holds the routers of another model: routers\.1\."),
        (_set_router("router_stop", 1), ArtifactError, r"holds the routers of another model: routers\.2\."),
        (_set_router("router_hidden_size", 4), ArtifactError, r"another model: .* of shape \[1, 8\], here .* \[1, 4\]"),
        (
            _other_tensors(lambda tensors: tensors.pop("routers.2.bias")),
            ArtifactError,
            r"routers\.2\.bias is missing, here it is of shape \[1\]",
        ),
        (_without("model.safetensors"), CheckpointError, "has no weights"),
        (_cut("model.safetensors", 1000), CheckpointError, "model.safetensors is damaged or cut short"),
        (_without("config.json"), CheckpointError, "has no config.json"),
    ],
)
def test_refuses_a_damaged_folder_in_one_line(
    copied: Path, damage: Any, error: type[ModcompileError], says: str
) -> None:
    damage(copied)
    with pytest.raises(error, match=says) as caught:
        load_with_routers(copied)
    assert "\n" not in str(caught.value)


def test_reading_the_configuration_needs_no_weights(copied: Path) -> None:
    (copied / "model.safetensors").unlink()
    assert read_router_config(copied) == tiny_routed("straight_through").router_config


def test_copies_all_but_what_came_of_it(copied: Path, tmp_path: Path) -> None:
    expected = contents(copied)
    update_report(copied, "rewrite", {"model": "tiny"})
    update_report(copied, "training", {"steps": 3})
    (copied / "training_history.png").touch()
    for name in ("onnx", "checkpoint-3"):
        (copied / name).mkdir()
        (copied / name / "file").touch()
    copy_routed_folder(copied, tmp_path / "copy")
    assert read_report(tmp_path / "copy") == {"rewrite": {"model": "tiny"}}
    (tmp_path / "copy" / "report.json").unlink()
    assert contents(tmp_path / "copy") == expected


def test_replaces_a_folder_of_ours_and_no_other(routed_folder: Path, copied: Path, tmp_path: Path) -> None:
    model = tiny_routed("straight_through")
    write_routed_folder(model, None, copied)
    assert not (copied / "tokenizer.json").exists()
    assert contents(copied)["model.safetensors"] == contents(routed_folder)["model.safetensors"]
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("years of work")
    for write in (lambda: write_routed_folder(model, None, foreign), lambda: copy_routed_folder(copied, foreign)):
        with pytest.raises(OutputError, match="was not made by modcompile"):
            write()
    assert [path.name for path in foreign.iterdir()] == ["thesis.txt"]


def test_base_files_are_those_of_the_base(copied: Path) -> None:
    expected = contents(copied).keys() - {"router_config.json", "routers.safetensors"}
    update_report(copied, "rewrite", {})
    (copied / "training_history.png").touch()
    (copied / "onnx").mkdir()
    assert [file.name for file in base_files(copied)] == sorted(expected)


def test_report_keeps_its_other_parts(tmp_path: Path) -> None:
    update_report(tmp_path, "rewrite", {"a": 1})
    update_report(tmp_path, "training", {"b": float("nan")})
    update_report(tmp_path, "rewrite", {"a": 2})
    assert read_report(tmp_path) == {"rewrite": {"a": 2}, "training": {"b": None}}


@pytest.mark.parametrize("text", ["", "{", "[]", "3"])
def test_a_damaged_report_is_as_good_as_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "report.json").write_text(text)
    assert read_report(tmp_path) == {}


def test_tells_where_time_was_spent_on_training(copied: Path, tmp_path: Path) -> None:
    assert not has_trained_routers(tmp_path / "nothing")
    assert not has_trained_routers(copied)
    update_report(copied, "rewrite", {})
    assert not has_trained_routers(copied)
    (copied / "checkpoint-5").mkdir()
    assert has_trained_routers(copied)
    (copied / "checkpoint-5").rmdir()
    update_report(copied, "training", {})
    assert has_trained_routers(copied)
