import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from modcompile.artifacts import read_report
from modcompile.cli import run
from modcompile.precision_router_files import has_precision_routers
from modcompile.quantize import main
from modcompile.quantized_folder import read_quantized_folder
from tests.folder_contents import contents
from tests.tiny_models import tiny_model
from tests.tiny_quantized import save_deciding_routers


@pytest.fixture(autouse=True)
def _in_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What has a default place is written to the current folder."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


def _error(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What the command says before it exits with status 2."""
    assert run(lambda: main(argv)) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.endswith("…")]
    assert len(lines) == 1
    return lines[0]


def test_writes_a_folder_of_several_precisions(base_folder: Path) -> None:
    before = contents(base_folder)
    result = subprocess.run(
        [sys.executable, "-m", "modcompile.quantize", str(base_folder), "--precisions", "8", "4", "--group_size", "32"],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "wrote tiny-quantized: 21 weights" in result.stdout
    assert "4 bits " in result.stdout
    assert contents(base_folder) == before
    assert [path.name for path in Path().iterdir()] == ["tiny-quantized"]
    read = read_quantized_folder(Path("tiny-quantized"))
    assert read.config.precisions == [4, 8]
    assert (Path("tiny-quantized") / "tokenizer.json").is_file()
    errors = read_report(Path("tiny-quantized"))["quantization"]["relative_error_of_weights"]
    assert 0 < errors["8"] < errors["4"] < 0.2


def test_replaces_what_is_its_own(base_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        assert run(lambda: main([str(base_folder), "--output_dir", "out", "--method", "rtn"])) == 0
    Path("other").mkdir()
    (Path("other") / "file").write_text("mine")
    capsys.readouterr()
    assert "was not made by modcompile" in _error([str(base_folder), "--output_dir", "other"], capsys)
    assert (
        run(lambda: main([str(base_folder), "--output_dir", "other", "--method", "rtn", "--overwrite_output_dir"])) == 0
    )


@pytest.mark.parametrize("kind", ["base", "quantized"])
def test_keeps_the_model_that_is_quantized(
    request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    model = Path(shutil.copytree(request.getfixturevalue(f"{kind}_folder"), "model"))
    before = contents(model)
    argv = ["model", "--output_dir", "./model", "--precisions", "4", "--method", "rtn"]
    for flags in ([], ["--overwrite_output_dir"]):
        assert "is the model that is quantized" in _error([*argv, *flags], capsys)
    assert contents(model) == before


def test_replaces_trained_routers_when_told_only(
    base_folder: Path, quantized_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(quantized_folder, "out"))
    save_deciding_routers(folder)
    before = contents(folder)
    argv = [str(base_folder), "--output_dir", "out", "--method", "rtn"]
    assert "out holds trained routers" in _error(argv, capsys)
    assert contents(folder) == before
    assert run(lambda: main([*argv, "--overwrite_output_dir"])) == 0
    assert not has_precision_routers(folder)


def test_rounds_for_the_inputs_of_the_calibration_text(base_folder: Path) -> None:
    flags = ["--precisions", "4", "--calibration_samples", "3", "--calibration_length", "32"]
    for method in ("rtn", "gptq"):
        main([str(base_folder), "--output_dir", method, "--method", method, *flags])
    nearest, found = (read_quantized_folder(Path(method)) for method in ("rtn", "gptq"))
    assert (found.config.method, found.config.calibration_samples, found.config.calibration_length) == ("gptq", 3, 32)
    for name, weight in found.weights.items():
        assert not torch.equal(weight.dequantize(4), nearest.weights[name].dequantize(4))


def test_without_a_tokenizer_weights_can_only_be_rounded_to_nearest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(tmp_path / "untold")
    tiny_model("llama").save_pretrained(folder)
    capsys.readouterr()
    assert "has no tokenizer" in (said := _error([folder], capsys)) and said.endswith("or round to nearest (rtn)")
    assert not list(Path().iterdir())
    assert run(lambda: main([folder, "--method", "rtn"])) == 0


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--precisions", "4", "4"], "--precisions is '4 4'; each may be given once"),
        (["--precisions", "3"], "--precisions is '3'; it must be some of 2, 4, 8, 16"),
        (["--precisions", "4", "x"], "--precisions"),
        (["--precisions", "4.5"], "--precisions"),
        (["--group_size", "48"], "--group_size is 48; it must be 32, 64 or 128"),
        (["--method", "mse"], "--method"),
        (["--calibration_samples", "0"], "--calibration_samples is 0; it must be a number, at least 1"),
        (["--calibration_length", "1"], "--calibration_length is 1; it must be a number, at least 2"),
        (["--weight_sharing", "none"], "--weight_sharing"),
        (["--no_such_flag"], "unknown: --no_such_flag"),
    ],
)
def test_refuses_options_in_one_line(
    base_folder: Path, argv: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert says in _error([str(base_folder), *argv], capsys)
    assert not list(Path().iterdir())


def test_refuses_weights_that_are_no_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "broken"
    tiny_model("llama").save_pretrained(folder)
    capsys.readouterr()
    state = load_file(folder / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    assert "model.layers.1.mlp.up_proj.weight holds NaN" in _error([str(folder)], capsys)
    assert not list(Path().iterdir())


def test_refuses_a_model_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert "nowhere" in _error(["./nowhere"], capsys)
