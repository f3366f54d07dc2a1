import json
import re
import shutil
from functools import partial
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from modcompile.cli import run
from modcompile.config import RouterConfig
from modcompile.evaluate import main
from tests.folder_contents import contents
from tests.tiny_any_precision import tiny_any_precision, write_any_precision
from tests.tiny_quantized import save_deciding_routers, write_tiny_quantized

FAST = ["--sequence_length", "32", "--max_samples", "1"]


@pytest.fixture(scope="module")
def quantized_folder(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_quantized(tmp_path_factory.mktemp("quantized") / "tiny", tokenizer)


@pytest.fixture(scope="module")
def gated_folder(quantized_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with routers that decide, and depth gates."""
    folder = Path(shutil.copytree(quantized_folder, tmp_path_factory.mktemp("gated") / "tiny"))
    save_deciding_routers(folder, RouterConfig(router_hidden_size=8))
    return folder


@pytest.mark.parametrize(("kind", "scored"), [("routed_folder", "hard"), ("quantized_folder", "router")])
def test_folder_decides_what_is_evaluated(
    kind: str, scored: str, tmp_path: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    own = Path(shutil.copytree(request.getfixturevalue(kind), tmp_path / "own"))
    (own / "report.json").write_text(json.dumps({"training": {"steps": 3}, "evaluation": "old"}))
    assert run(partial(main, [str(own), *FAST])) == 0
    written = json.loads((own / "report.json").read_text())
    assert set(written) == {"training", "evaluation"}
    assert written["training"] == {"steps": 3}
    assert f"{written['evaluation'][scored]['perplexity']:.3f}" in capsys.readouterr().out
    assert set(written["evaluation"]["versions"]) == {"modcompile", "torch", "transformers"}


@pytest.mark.parametrize(
    ("kind", "flags", "message"),
    [
        ("routed_folder", ["--precisions", "4"], "is routed, not quantized: leave out --precisions"),
        ("routed_folder", ["--calibration_samples", "2"], "is routed, not quantized: leave out --calibration_samples"),
        (
            "quantized_folder",
            ["--hard_threshold", "0.25", "--batch_size", "2"],
            "is quantized, not routed: leave out --hard_threshold, --batch_size",
        ),
        (
            "gated_folder",
            ["--hard_threshold", "0.25", "--batch_size", "2"],
            "is quantized, and evaluated one sequence a call: leave out --batch_size",
        ),
    ],
)
def test_flags_of_the_other_kind_are_refused(
    kind: str,
    flags: list[str],
    message: str,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = request.getfixturevalue(kind)
    before = contents(folder)
    assert run(partial(main, [str(folder), *flags])) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", f"error: {folder} {message}\n")
    assert contents(folder) == before


def test_a_threshold_is_for_the_router_of_a_folder_with_depth_gates(
    gated_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Above 1, it skips all blocks; the fixed precisions have them all."""
    own = Path(shutil.copytree(gated_folder, tmp_path / "own"))
    assert run(partial(main, [str(own), *FAST, "--hard_threshold", "2"])) == 0
    written = json.loads((own / "report.json").read_text())["evaluation"]
    assert written["hard_threshold"] == 2
    assert written["router"]["average_bits"] == 0
    assert {bits: fixed["average_bits"] for bits, fixed in written["fixed"].items()} == {"2": 2, "4": 4, "16": 16}
    assert "depth gates at threshold 2\n" in capsys.readouterr().out


def test_depth_and_precision_are_swept_together(
    gated_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = Path(shutil.copytree(gated_folder, tmp_path / "own"))
    assert run(partial(main, [str(own), *FAST, "--sweep", "--sweep_active_ratios", "0.5"])) == 0
    points = json.loads((own / "report.json").read_text())["evaluation"]["sweep"]
    assert {point["way"] for point in points} == {"depth alone", "precision alone", "both"}
    table = capsys.readouterr().out
    best = [point for point in points if point["on_frontier"]]
    assert 0 < len(best) == sum(line.endswith("  *") for line in table.splitlines())
    assert all(f"{point['perplexity']:.3f}" in table for point in points)
    assert (own / "joint.png").is_file()


def test_what_has_no_bytes_to_count_is_not_measured_first(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Codes of look-up tables can be evaluated, but not swept."""
    folder = tmp_path / "tables"
    write_any_precision(tiny_any_precision(), folder)
    tokenizer.save_pretrained(folder)
    save_deciding_routers(folder, RouterConfig(router_hidden_size=8))
    before = contents(folder)
    assert run(partial(main, [str(folder), *FAST, "--sweep"])) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "is looked up in tables" in captured.err
    assert contents(folder) == before


@pytest.mark.parametrize("flags", [[], ["--precisions", "4"]])
def test_a_folder_that_is_not_there_is_one_line(
    tmp_path: Path, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(partial(main, [str(tmp_path / "nothing"), *flags])) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.fullmatch(r"error: .*nothing is not a folder; .*\n", captured.err)


def test_help_explains_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    usage, *entries = re.split(r"\n  (?=-)", capsys.readouterr().out)
    assert "python -m modcompile.evaluate" in usage
    explained = {entry.split()[0]: " ".join(entry.split()) for entry in entries}
    text = ("text_file", "sequence_length", "max_samples", "seed")
    for flag in (*text, "hard_threshold", "batch_size", "precisions", "calibration_samples"):
        assert "(default: " in explained[f"--{flag}"]
        assert len(explained[f"--{flag}"].split()) > 5
