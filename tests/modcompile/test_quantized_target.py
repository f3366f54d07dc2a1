from pathlib import Path

import pytest

from modcompile.checkpoint_sources import CheckpointSource
from modcompile.errors import OutputError
from modcompile.precision_router_files import PRECISION_ROUTERS
from modcompile.quantized_folder import QUANTIZATION_CONFIG
from modcompile.quantized_target import check_quantized_target


@pytest.fixture(autouse=True)
def _in_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


def _folder(path: str, *files: str) -> CheckpointSource:
    for file in files:
        (Path(path) / file).parent.mkdir(parents=True, exist_ok=True)
        (Path(path) / file).touch()
    return CheckpointSource("folder", str(Path(path).resolve()))


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("output", ["model", "./model", "link", "../work/model"])
def test_the_model_that_is_quantized_is_kept(output: str, overwrite: bool) -> None:
    source = _folder("model", QUANTIZATION_CONFIG)
    Path("link").symlink_to("model")
    with pytest.raises(OutputError, match="is the model that is quantized, which is kept"):
        check_quantized_target(Path(output), source, in_place=False, overwrite=overwrite)
    check_quantized_target(Path(output), source, in_place=True, overwrite=overwrite)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_folder_that_holds_the_model_is_kept(in_place: bool) -> None:
    source = _folder("all/models/model", QUANTIZATION_CONFIG)
    with pytest.raises(OutputError, match=r"all is or holds .*model, which is kept"):
        check_quantized_target(Path("all"), source, in_place=in_place, overwrite=True)
    check_quantized_target(Path("all/models/model-quantized"), source, in_place=in_place, overwrite=True)


def test_a_folder_that_holds_the_gguf_file_is_kept() -> None:
    _folder("model", "q8.gguf")
    source = CheckpointSource("gguf", str(Path("model").resolve()), "q8.gguf")
    with pytest.raises(OutputError, match=r"model is or holds .*q8\.gguf, which is kept"):
        check_quantized_target(Path("model"), source, in_place=False, overwrite=True)


def test_a_model_of_a_hub_is_not_where_its_name_would_be_a_path() -> None:
    source = CheckpointSource("hub", "org/model")
    for output in ("org", "org/model"):
        check_quantized_target(Path(output), source, in_place=False, overwrite=False)


@pytest.mark.parametrize("trained", [PRECISION_ROUTERS, "checkpoint-20/trainer_state.json"])
def test_trained_routers_are_replaced_when_told_only(trained: str) -> None:
    source = _folder("model", QUANTIZATION_CONFIG, trained)
    _folder("other", QUANTIZATION_CONFIG, trained)
    for output, in_place in (("model", True), ("other", True), ("other", False)):
        with pytest.raises(OutputError, match=f"{output} holds trained routers; .* pass --overwrite_output_dir"):
            check_quantized_target(Path(output), source, in_place=in_place, overwrite=False)
        check_quantized_target(Path(output), source, in_place=in_place, overwrite=True)


def test_what_is_not_ours_is_replaced_when_told_only() -> None:
    source = _folder("model", QUANTIZATION_CONFIG)
    _folder("notes", "text")
    with pytest.raises(OutputError, match="notes exists and was not made by modcompile"):
        check_quantized_target(Path("notes"), source, in_place=False, overwrite=False)
    check_quantized_target(Path("notes"), source, in_place=False, overwrite=True)
