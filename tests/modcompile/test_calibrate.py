import json
import shutil
from pathlib import Path

import onnx
import pytest

from modcompile import evaluate, generate
from modcompile.artifacts import load_with_routers, read_report, save_routers, write_routed_folder
from modcompile.calibrate import main
from modcompile.calibrated_thresholds import read_thresholds
from modcompile.config import RouterConfig
from modcompile.errors import ArtifactError, ConfigError
from modcompile.export.export_config import ExportConfig
from modcompile.export.export_folder import export_folder
from modcompile.export.session import MODEL_FILE
from tests.tiny_quantized import save_deciding_routers, write_tiny_quantized
from tests.tiny_routed import tiny_routed

_TEXT = ["--sequence_length", "32", "--max_samples", "8"]


@pytest.fixture
def folder(routed_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(routed_folder, tmp_path / "routed"))


def test_one_training_serves_a_range_of_budgets(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What was calibrated holds, nearly, for another text of the same kind, in an evaluation and in an export."""
    main([str(folder), "--target_active_ratio", "0.7", "0.4", *_TEXT, "--max_samples", "32"])
    found = read_thresholds(folder)
    assert [each.target_active_ratio for each in found] == [0.7, 0.4]
    assert found[0].thresholds != found[1].thresholds
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].endswith(" tokens of the built-in validation split")
    assert [line.split()[:2] for line in printed[2:]] == [
        [f"{each.target_active_ratio:.3f}", f"{each.active_ratio:.3f}"] for each in found
    ]
    report = read_report(folder)["calibration"]
    assert [each["thresholds"] for each in report["calibrated"]] == [list(each.thresholds) for each in found]
    for budget, each in (("auto", found[0]), ("auto:0.4", found[1])):
        evaluate.main([str(folder), "--hard_threshold", budget, *_TEXT])
        evaluation = read_report(folder)["evaluation"]
        assert evaluation["hard_threshold"] == list(each.thresholds)
        assert evaluation["hard"]["active_ratio"] == pytest.approx(each.target_active_ratio, abs=0.05)
        config = ExportConfig(hard_threshold=budget, verify="none", fold_gates="none")
        export_folder(folder, folder / "onnx", config, overwrite=True)
        graph = onnx.load(folder / "onnx" / MODEL_FILE, load_external_data=False).graph
        stored = {tensor.name: tensor for tensor in graph.initializer}["routing_threshold"]
        assert onnx.numpy_helper.to_array(stored).tolist() == pytest.approx(each.thresholds)


def test_generates_at_a_budget(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(folder), "--target_active_ratio", "0", "1", *_TEXT])
    for budget, ratio in (("auto", "0.000"), ("auto:1", "1.000")):
        flags = ["--prompt", "the model", "--max_new_tokens", "3", "--hard_threshold", budget]
        generate.main([str(folder), *flags])
        assert f"active ratio {ratio}" in capsys.readouterr().err


def test_calibrates_on_a_text_of_ones_own(folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a router reads the hidden state of each token and decides whether a block is executed. " * 40)
    main([str(folder), "--text_file", str(text), "--threshold_scope", "per_layer", *_TEXT])
    assert read_report(folder)["calibration"]["text"] == str(text)
    (found,) = read_thresholds(folder)
    assert found.scope == "per_layer"
    assert len(set(found.thresholds)) == len(found.thresholds) == 2


def test_searches_thresholds_for_each_gate(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--target_active_ratio", "0.5", "--threshold_scope", "searched", "--search_samples", "2"]
    main([str(folder), *flags, *_TEXT])
    (found,) = read_thresholds(folder)
    assert found.scope == "searched"
    assert read_report(folder)["calibration"]["calibrated"][0]["scope"] == "searched"
    assert capsys.readouterr().out.splitlines()[2].split()[0] == "0.500"
    main([str(folder), *flags, *_TEXT, "--bf16"])
    (halved,) = read_thresholds(folder)
    assert halved.scope == "searched"
    assert halved.active_ratio == pytest.approx(found.active_ratio, abs=0.05)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--search_samples", "0"], r"^--search_samples is 0"),
        (["--bf16"], r"^--search_samples and --bf16 are for a search; add --threshold_scope searched$"),
        (["--search_samples", "2"], r"^--search_samples and --bf16 are for a search"),
        (
            ["--threshold_scope", "searched", "--search_samples", "48"],
            r"^--search_samples 48 are of --max_samples 24; make that as many$",
        ),
    ],
)
def test_refuses_a_search_that_is_none(folder: Path, flags: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        main([str(folder), *flags])


def test_refuses_a_folder_with_precisions(tmp_path: Path) -> None:
    save_deciding_routers(write_tiny_quantized(tmp_path / "quantized", None), RouterConfig())
    with pytest.raises(ConfigError, match=r"quantized has precisions, whose depth gates can't be calibrated; "):
        main([str(tmp_path / "quantized")])


def test_thresholds_go_with_the_routers_that_they_are_for(folder: Path, tmp_path: Path) -> None:
    main([str(folder), *_TEXT])
    model = load_with_routers(folder, "auto")
    assert model.hard_thresholds == pytest.approx(read_thresholds(folder)[0].thresholds)
    save_routers(model, folder)
    with pytest.raises(ArtifactError, match=r"has no thresholds\.json; make it with"):
        load_with_routers(folder, "auto")
    write_routed_folder(tiny_routed("soft"), None, tmp_path / "other")
    assert not (tmp_path / "other" / "thresholds.json").exists()


def test_a_budget_is_named_once(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"^--target_active_ratio names a budget twice"):
        main([str(folder), "--target_active_ratio", "0.5", "0.5"])
    with pytest.raises(ConfigError, match=r"^--target_active_ratio is 1\.5"):
        main([str(folder), "--target_active_ratio", "1.5"])


def test_a_folder_without_routers_is_refused(base_folder: Path) -> None:
    with pytest.raises(ArtifactError, match=r"has no router_config\.json"):
        main([str(base_folder)])


def test_a_damaged_file_is_named(folder: Path) -> None:
    main([str(folder), *_TEXT])
    stored = json.loads((folder / "thresholds.json").read_text())
    stored["calibrated"][0]["thresholds"] = [0.5]
    (folder / "thresholds.json").write_text(json.dumps(stored))
    with pytest.raises(ConfigError, match=r"^1 thresholds for 2 gates"):
        load_with_routers(folder, "auto")
