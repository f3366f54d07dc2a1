import shutil
from pathlib import Path

import onnx_ir as ir
import pytest
from transformers import PreTrainedTokenizerFast

from modcompile.calibrated_thresholds import CalibratedThresholds, read_thresholds, write_thresholds
from modcompile.errors import ArtifactError, ConfigError
from modcompile.export.build_model import build_model
from modcompile.export.export_config import ExportConfig
from modcompile.export.export_folder import export_folder
from modcompile.export.session import MODEL_FILE
from modcompile.generate import main
from modcompile.generate_onnx import find_onnx_folder
from modcompile.layerwise import LayerwiseQuantizeForCausalLM
from modcompile.precision_config import QuantizationConfig
from modcompile.quantized_folder import write_quantized_folder
from modcompile.quantizing import quantize_base
from tests.tiny_routed import tiny_base


@pytest.fixture(scope="module")
def folder(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantized folder with its export; not to be changed. Its routers, untrained, choose the original weights."""
    path = tmp_path_factory.mktemp("quantized") / "tiny"
    config = QuantizationConfig(precisions=[4, 16], group_size=32, method="rtn")
    write_quantized_folder(quantize_base(tiny_base(), config), tokenizer, path)
    model = LayerwiseQuantizeForCausalLM.from_quantized(path)
    (path / "onnx").mkdir()
    ir.save(build_model(model.export_graph()), path / "onnx" / MODEL_FILE)
    for file in path.glob("*.json"):
        shutil.copyfile(file, path / "onnx" / file.name)
    return path


def test_a_quantized_folder_prints_as_in_torch(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed = []
    for runtime in ("torch", "onnx"):
        main([str(folder), "--prompt", "Names refer to", "--max_new_tokens", "12", "--runtime", runtime])
        printed.append(capsys.readouterr().out)
    assert len(printed[0]) > len("Names refer to") + 10
    assert printed[1] == printed[0]


def test_without_an_export_it_says_how_to_make_one(folder: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(folder, tmp_path / "own"))
    shutil.rmtree(own / "onnx")
    with pytest.raises(ArtifactError, match=r"own has no model\.onnx, .*; run python -m modcompile\.export .*own$"):
        main([str(own), "--prompt", "Names", "--runtime", "onnx"])


def test_an_exported_folder_is_found_in_its_source_or_by_itself(folder: Path) -> None:
    assert find_onnx_folder(folder) == find_onnx_folder(folder / "onnx") == folder / "onnx"


def test_auto_takes_the_thresholds_of_the_gates_that_are_left(
    routed_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of gates of layers 0 and 2, the second is folded, so in torch it gets a threshold at which it is open."""
    folder = Path(shutil.copytree(routed_folder, tmp_path / "routed"))
    found = [CalibratedThresholds(budget, (first, 0.0), 0.0, "per_layer") for budget, first in ((0.8, 0.5), (0.5, 2.0))]
    write_thresholds(found, folder)
    export_folder(
        folder, folder / "onnx", ExportConfig(always_active="2", fold_gates="none", verify="none", emit_routing=True)
    )
    assert [each.thresholds for each in read_thresholds(folder / "onnx")] == [(0.5,), (2.0,)]
    told = []
    for threshold in ("auto", "auto:0.5"):
        printed = []
        for runtime in ("torch", "onnx"):
            argv = [str(folder), "--prompt", "Names refer to", "--max_new_tokens", "12", "--runtime", runtime]
            main([*argv, "--hard_threshold", threshold])
            printed.append(capsys.readouterr())
        assert printed[1].out == printed[0].out
        told.append([each.err.partition("active ratio ")[2].split()[0].rstrip(",") for each in printed])
    (first, again), (second, twice) = told
    assert first == again != second == twice
    with pytest.raises(ConfigError, match=r"has thresholds for 0\.8 0\.5, none for 0\.7; give modcompile\.calibrate "):
        main([str(folder), "--prompt", "Names", "--runtime", "onnx", "--hard_threshold", "auto:0.7"])


def test_auto_needs_thresholds_from_before_the_export(onnx_folder: Path) -> None:
    message = r"onnx was exported without calibrated thresholds; run modcompile\.calibrate on the routed folder, and"
    with pytest.raises(ConfigError, match=message):
        main([str(onnx_folder), "--prompt", "Names", "--runtime", "onnx", "--hard_threshold", "auto"])
