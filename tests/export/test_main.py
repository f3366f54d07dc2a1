import shutil
import subprocess
import sys
from pathlib import Path

import onnxruntime as ort
import pytest

from modcompile.artifacts import read_report
from modcompile.cli import run
from modcompile.export import verification
from modcompile.export.__main__ import main
from modcompile.export.session import MODEL_FILE
from tests.export.prebuilt import use_prebuilt
from tests.tiny_any_precision import tiny_any_precision, write_any_precision

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(routed_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(routed_folder, tmp_path / "routed"))


def export(*arguments: object) -> int:
    """The exit status."""
    return run(lambda: main(list(map(str, arguments))))


def test_exports_as_asked_for(
    folder: Path,
    onnx_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    use_prebuilt(onnx_folder, monkeypatch)
    output = tmp_path / "elsewhere" / "model"
    assert export(folder, "--emit_routing", "--output_dir", output) == 0
    captured = capfd.readouterr()
    session = ort.InferenceSession(str(output / MODEL_FILE), providers=["CPUExecutionProvider"])
    assert [value.name for value in session.get_outputs()][-2:] == ["routing.0", "routing.2"]
    assert not (folder / "onnx").exists()
    assert len(captured.out.splitlines()) == 3
    assert captured.out.startswith(f"wrote {output} (")
    assert [line for line in captured.err.splitlines() if not line.endswith("…")] == []
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_profiles_every_stage_on_stderr_and_in_the_report(
    folder: Path, onnx_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use_prebuilt(onnx_folder, monkeypatch)
    assert export(folder, "--verify", "none", "--profile") == 0
    captured = capsys.readouterr()
    costs = read_report(folder)["profile"]
    assert {"importing", "loading weights", "tracing", "inserting routers", "writing the ONNX model"} <= set(costs)
    assert "verifying" not in costs
    assert set(costs["tracing"]) == {"seconds", "cpu_seconds", "peak_mib"}
    told = {line.split("  ")[0] for line in captured.err.splitlines()}
    assert set(costs) <= told
    assert "not verified" in captured.out.splitlines()[-1]


def test_writes_into_the_routed_folder_by_default(
    folder: Path, onnx_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_prebuilt(onnx_folder, monkeypatch)
    assert export(folder) == 0
    session = ort.InferenceSession(str(folder / "onnx" / MODEL_FILE), providers=["CPUExecutionProvider"])
    assert session.get_outputs()[-1].name == "present.2.value"


def test_a_model_that_is_not_verified_is_status_1(
    folder: Path, onnx_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use_prebuilt(onnx_folder, monkeypatch)
    monkeypatch.setattr(verification, "MAX_LOGIT_DIFFERENCE", -1.0)
    assert export(folder) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: the exported model does not compute what PyTorch does: logits differ by ")
    assert [path.name for path in (folder / "onnx").iterdir()] == ["verification.json"]


@pytest.mark.parametrize("threshold", ["nan", "-1", "inf"])
def test_a_value_that_is_no_threshold_is_status_2(
    folder: Path, threshold: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(folder, "--hard_threshold", threshold) == 2
    assert capsys.readouterr().err == f"error: --hard_threshold is {threshold}; it must be a number, at least 0\n"
    assert not (folder / "onnx").exists()


def test_a_target_that_is_unknown_is_status_2(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export(folder, "--target", "tensorrt") == 2
    assert capsys.readouterr().err.startswith("error: argument --target: invalid choice: 'tensorrt' ")
    assert not (folder / "onnx").exists()


def test_a_folder_of_somebody_else_is_status_2_and_untouched(folder: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "diary.txt").write_text("dear diary", encoding="utf-8")
    command = [sys.executable, "-m", "modcompile.export", str(folder), "--output_dir", str(foreign)]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert finished.returncode == 2
    assert finished.stdout == ""
    assert finished.stderr.count("\n") == 1
    assert finished.stderr.startswith(f"error: {foreign} exists and was not made by modcompile; ")
    assert [path.name for path in foreign.iterdir()] == ["diary.txt"]


def test_may_replace_a_folder_of_somebody_else_where_told_to(
    folder: Path, onnx_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_prebuilt(onnx_folder, monkeypatch)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "diary.txt").touch()
    assert export(folder, "--output_dir", tmp_path / "foreign", "--overwrite_output_dir") == 0
    assert not (tmp_path / "foreign" / "diary.txt").exists()


def test_a_folder_that_does_not_exist_is_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export(tmp_path / "nothing") == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'nothing'} is not a folder")
    assert not list(tmp_path.iterdir())


def test_help_explains_every_flag_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for flag in (
        "--target",
        "--hard_threshold",
        "--emit_routing",
        "--fold_gates",
        "none",
        "--output_dir",
        "--overwrite_output_dir",
        "folder",
    ):
        assert flag in text
    assert "for that budget. (default: 0.5)" in text


def test_exports_a_quantized_folder(
    precision_onnx_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    use_prebuilt(precision_onnx_folder, monkeypatch)
    folder, output = precision_onnx_folder.parent, tmp_path / "onnx"
    monkeypatch.setattr(verification, "MAX_LOGIT_DIFFERENCE", -1.0)
    assert export(folder, "--output_dir", output) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: the exported model does not compute what PyTorch does: logits differ by ")
    assert [path.name for path in output.iterdir()] == ["verification.json"]
    monkeypatch.undo()
    use_prebuilt(precision_onnx_folder, monkeypatch)
    shutil.copytree(folder, tmp_path / "quantized", ignore=shutil.ignore_patterns("onnx"))
    assert export(tmp_path / "quantized", "--output_dir", output) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith(" bits on average")
    session = ort.InferenceSession(str(output / MODEL_FILE), providers=["CPUExecutionProvider"])
    assert session.get_outputs()[-1].name == "present.2.value"


def test_a_folder_of_look_up_tables_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_any_precision(tiny_any_precision(), tmp_path / "tables")
    assert export(tmp_path / "tables") == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if not line.endswith("…")]
    (error,) = errors
    assert error.startswith("error: ")
    assert error.endswith("to export, quantize the original with modcompile.quantize")
    assert not (tmp_path / "tables" / "onnx").exists()
