import json
import re
import shutil
from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.image import imread
from transformers import PreTrainedTokenizerFast

from modcompile.cli import run
from modcompile.config import RouterConfig
from modcompile.evaluate import main
from modcompile.evaluate_precisions import PLOT
from modcompile.evaluation_text import EvaluationTextConfig, load_calibration_blocks, load_evaluation_blocks
from modcompile.layerwise import LayerwiseQuantizeForCausalLM
from modcompile.precision_evaluation import PrecisionMeasurement, evaluate_precisions
from tests.folder_contents import contents
from tests.tiny_quantized import BITS, save_deciding_routers, write_tiny_quantized

FAST = ["--sequence_length", "32", "--max_samples", "3", "--calibration_samples", "2"]


@pytest.fixture(scope="module")
def folder(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantized folder that is not to be changed."""
    return write_tiny_quantized(tmp_path_factory.mktemp("quantized") / "tiny", tokenizer)


@pytest.fixture(scope="module")
def evaluated(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder after one run, and its stdout."""
    own = Path(shutil.copytree(folder, tmp_path_factory.mktemp("evaluated") / "tiny"))
    (own / "report.json").write_text(json.dumps({"quantization": {"model": "tiny"}, "evaluation": "old"}))
    with redirect_stdout(StringIO()) as stdout:
        main([*FAST, str(own)])
    return own, stdout.getvalue()


@pytest.fixture(scope="module")
def written(evaluated: tuple[Path, str]) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((evaluated[0] / "report.json").read_text())
    assert report["quantization"] == {"model": "tiny"}
    evaluation: dict[str, Any] = report["evaluation"]
    return evaluation


def _numbers(measured: PrecisionMeasurement) -> dict[str, float]:
    return {"perplexity": measured.perplexity, "loss": measured.loss, "average_bits": measured.average_bits}


def test_report_holds_what_evaluate_precisions_finds(folder: Path, written: dict[str, Any]) -> None:
    text = EvaluationTextConfig(sequence_length=32, max_samples=3)
    model = LayerwiseQuantizeForCausalLM.from_quantized(folder)
    expected = evaluate_precisions(
        model, load_evaluation_blocks(text, folder), load_calibration_blocks(text, folder, 2)
    )
    assert written["text"] == "the built-in test split"
    assert (written["sequence_length"], written["sequences"], written["predicted_tokens"]) == (32, 3, 3 * 31)
    assert written["calibration_sequences"] == 2
    assert written["fixed"] == {str(bits): _numbers(measured) for bits, measured in expected.fixed.items()}
    shares = [{str(bits): share for bits, share in by_bits.items()} for by_bits in expected.router.shares]
    assert written["router"] == {
        **_numbers(expected.router),
        "trained": False,
        "caveats": ["choice of bits untrained"],
        "shares_per_layer": shares,
    }
    assert "hard_threshold" not in written
    assert written["static"] == [
        {
            **_numbers(measured),
            "bits_per_layer": list(allocation),
            "at_router": allocation == expected.at_router,
        }
        for allocation, measured in expected.static.items()
    ]
    assert sum(point["at_router"] for point in written["static"]) == 1
    assert written["sensitivity_per_layer"] == [
        {str(bits): increase for bits, increase in by_bits.items()} for by_bits in expected.sensitivity
    ]
    assert set(written["versions"]) == {"modcompile", "torch", "transformers"}


def test_prints_a_plain_table(evaluated: tuple[Path, str], written: dict[str, Any]) -> None:
    first, header, *rows, layers, plotted = evaluated[1].splitlines()
    assert first == "93 predicted tokens of the built-in test split, 3 sequences of up to 32"
    assert header.split() == ["bits", "perplexity", "loss"]
    mixed = [point for point in written["static"] if len(set(point["bits_per_layer"])) > 1]
    expected = [
        *(("fixed", measured) for measured in written["fixed"].values()),
        *(("static", point) for point in mixed),
        ("router", written["router"]),
    ]
    assert mixed
    for row, (name, numbers) in zip(rows, expected, strict=True):
        bits, perplexity, loss = (numbers[key] for key in ("average_bits", "perplexity", "loss"))
        assert row.split()[:4] == [name, f"{bits:.2f}", f"{perplexity:.3f}", f"{loss:.4f}"]
    assert rows[-1].endswith("  choice of bits untrained")
    assert [row for row in rows if row.endswith("  the most bits within the router's")] == [rows[len(BITS) - 1]]
    assert layers == "router's bits by layer: 0:16.00 1:16.00 2:16.00"
    assert plotted == f"plotted in {evaluated[0] / PLOT}"
    assert "\x1b" not in evaluated[1]


@pytest.mark.parametrize(
    ("known", "asked_for", "trained"),
    [(None, None, False), ([4, 16], None, True), ([4, 16], [16], True), ([4, 16], [2, 4], False)],
)
def test_routers_that_are_untrained_are_called_so(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    known: list[int] | None,
    asked_for: list[int] | None,
    trained: bool,
) -> None:
    """Nobody has trained any, or not for these precisions."""
    own = Path(shutil.copytree(folder, tmp_path / "own"))
    if known is not None:
        save_deciding_routers(own, precisions=known)
    main([str(own), *FAST, *([] if asked_for is None else ["--precisions", *map(str, asked_for)])])
    written = json.loads((own / "report.json").read_text())["evaluation"]["router"]
    assert written["trained"] is trained
    assert written["caveats"] == ([] if trained else ["choice of bits untrained"])
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("router ")]
    assert row.endswith(f"{written['loss']:.4f}{'' if trained else '  choice of bits untrained'}")


@pytest.fixture(scope="module")
def gated(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with depth gates beside routers that decide."""
    own = Path(shutil.copytree(folder, tmp_path_factory.mktemp("gated") / "tiny"))
    save_deciding_routers(own, RouterConfig(router_hidden_size=8), precisions=[4, 16])
    return own


@pytest.mark.parametrize(
    ("threshold", "comparable"), [("0", True), ("2", False)], ids=["all gates open", "all blocks skipped"]
)
def test_fewer_bits_than_any_static_allocation_are_told(
    gated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], threshold: str, comparable: bool
) -> None:
    own = Path(shutil.copytree(gated, tmp_path / "own"))
    main([str(own), *FAST, "--hard_threshold", threshold])
    written = json.loads((own / "report.json").read_text())["evaluation"]
    assert written["router"]["caveats"] == ([] if comparable else ["fewer bits than any static allocation"])
    assert sum(point["at_router"] for point in written["static"]) == comparable
    rows = capsys.readouterr().out.splitlines()
    assert sum(row.endswith("the most bits within the router's") for row in rows) == comparable
    told = [row for row in rows if "fewer bits than any static allocation" in row]
    assert [row.split()[0] for row in told] == ([] if comparable else ["router"])


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_runs_on_the_fastest_device(folder: Path, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """Asked of the loading alone, for want of a GPU."""
    found: list[object] = []

    class _LoadedError(Exception):
        """Ends the command."""

    def load(*_: object, device: object = "cpu", **__: object) -> None:
        found.append(device)
        raise _LoadedError

    monkeypatch.setattr(torch.cuda, "is_available", lambda: device == "cuda")
    monkeypatch.setattr(LayerwiseQuantizeForCausalLM, "from_quantized", load)
    with pytest.raises(_LoadedError):
        main([str(folder), *FAST])
    assert found == [device]


def test_only_the_report_and_a_plot_are_written(evaluated: tuple[Path, str], folder: Path) -> None:
    own = evaluated[0]
    assert contents(own).items() - contents(folder).items() == {
        (name, contents(own)[name]) for name in ("report.json", PLOT)
    }
    assert imread(own / PLOT).ndim == 3


def test_takes_some_of_the_precisions(folder: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(folder, tmp_path / "own"))
    text = tmp_path / "a.txt"
    text.write_text("Some lines.\n" * 20)
    main([str(own), "--precisions", "16", "2", "--text_file", str(text), *FAST])
    written = json.loads((own / "report.json").read_text())["evaluation"]
    assert written["text"] == str(text)
    assert list(written["fixed"]) == ["2", "16"]
    assert {bits for point in written["static"] for bits in point["bits_per_layer"]} == {2, 16}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--precisions", "8"], f"has no weights of 8 bits; it has {', '.join(map(str, BITS))}"),
        (["--precisions", "x"], "--precisions"),
        (["--calibration_samples", "0"], "--calibration_samples is 0"),
        (["--sequence_length", "129"], "--sequence_length 129 is above the 128 positions"),
        (["--max_samples", "0"], "--max_samples is 0"),
        (["--text_file", "missing.txt"], "missing.txt does not exist"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refuses_options_in_one_line(
    folder: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(folder)
    assert run(partial(main, [str(folder), *FAST, *flags])) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.fullmatch(r"error: .*\n", captured.err)
    assert message in captured.err
    assert contents(folder) == before


@pytest.mark.parametrize("name", ["quantized.safetensors", "tokenizer*"])
def test_names_what_a_folder_lacks(folder: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    own = Path(shutil.copytree(folder, tmp_path / "own"))
    removed = list(own.glob(name))
    assert removed
    for path in removed:
        path.unlink()
    assert run(partial(main, [str(own), *FAST])) == 2
    assert re.fullmatch(r"error: .*own.* (can't be read|has no tokenizer).*\n", capsys.readouterr().err)
