import json
import shutil
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from matplotlib.image import imread

from modcompile.artifacts import write_routed_folder
from modcompile.config import RouterConfig
from modcompile.errors import ArtifactError, ConfigError, DataError, ModcompileError
from modcompile.evaluate import main
from modcompile.evaluation_text import EvaluationTextConfig, load_evaluation_blocks
from modcompile.perplexity import evaluate_model
from modcompile.routed_graph import build_routed
from tests.tiny_routed import ROUTED_LAYERS, tiny_base, tiny_routed
from tests.tiny_tokenizer import make_tokenizer

FAST = ["--sequence_length", "64", "--max_samples", "3"]


@pytest.fixture
def own_folder(routed_folder: Path, tmp_path: Path) -> Path:
    """A copy of the routed folder that a test may change."""
    return Path(shutil.copytree(routed_folder, tmp_path / "own"))


@pytest.fixture(scope="module")
def evaluated(routed_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """report.json and stdout of one run."""
    folder = Path(shutil.copytree(routed_folder, tmp_path_factory.mktemp("evaluated") / "tiny"))
    (folder / "report.json").write_text(json.dumps({"training": {"steps": 3}, "evaluation": "old"}))
    with redirect_stdout(StringIO()) as stdout:
        main([str(folder), "--hard_threshold", "0.25", *FAST])
    return json.loads((folder / "report.json").read_text()), stdout.getvalue()


def test_report_holds_what_evaluate_model_finds(evaluated: tuple[dict[str, Any], str], routed_folder: Path) -> None:
    written = evaluated[0]["evaluation"]
    blocks = load_evaluation_blocks(EvaluationTextConfig(sequence_length=64, max_samples=3), routed_folder)
    expected = evaluate_model(tiny_routed("straight_through", use_cache=False), blocks, hard_threshold=0.25)
    for mode, measured in expected.modes.items():
        assert written[mode] == {
            "perplexity": measured.perplexity,
            "loss": measured.loss,
            "active_ratio": measured.active_ratio,
            "block_work": measured.block_work,
            "active_ratio_per_layer": {str(layer): measured.active_ratio_per_layer[layer] for layer in ROUTED_LAYERS},
        }
    assert written["dense"]["active_ratio"] == 1.0
    assert written["hard_threshold"] == 0.25
    assert written["text"] == "the built-in test split"
    assert (written["sequence_length"], written["sequences"], written["predicted_tokens"]) == (64, 3, 3 * 63)
    assert set(written["versions"]) == {"modcompile", "torch", "transformers"}


def test_prints_a_plain_table(evaluated: tuple[dict[str, Any], str]) -> None:
    written, lines = evaluated[0]["evaluation"], evaluated[1].splitlines()
    assert lines[0] == "189 predicted tokens of the built-in test split, 3 sequences of up to 64"
    assert lines[1].split() == ["perplexity", "loss", "active", "ratio", "block", "work"]
    notes = {
        "dense": "every gate open: the base model",
        "soft": "gates as trained (straight_through: 0 or 1, so hard at 0.5 by construction)",
        "hard": "threshold 0.25",
    }
    for line, (mode, note) in zip(lines[2:5], notes.items(), strict=True):
        numbers = [f"{written[mode][name]:.{digits}f}" for name, digits in (("perplexity", 3), ("loss", 4))]
        numbers += [f"{written[mode][name]:.3f}" for name in ("active_ratio", "block_work")]
        assert line.split(maxsplit=5) == [mode, *numbers, note]
    ratios = written["hard"]["active_ratio_per_layer"]
    assert lines[5:] == [f"hard active ratio by layer: 0:{ratios['0']:.3f} 2:{ratios['2']:.3f}"]
    assert "\x1b" not in evaluated[1]


@pytest.mark.parametrize(
    ("flags", "error", "message"),
    [
        (["--hard_threshold", "nan"], ConfigError, "--hard_threshold is nan"),
        (
            ["--hard_threshold", "half"],
            ConfigError,
            "argument --hard_threshold/--hard-threshold: 'half' is not understood",
        ),
        (["--hard_threshold", "-0.5"], ConfigError, "--hard_threshold is -0.5"),
        (["--sequence_length", "1"], ConfigError, "--sequence_length is 1"),
        (["--sequence_length", "129"], ConfigError, "--sequence_length 129 is above the 128 positions of the model"),
        ([], ConfigError, "--sequence_length 512 is above the 128 positions of the model"),
        (["--batch_size", "0"], ConfigError, "--batch_size is 0"),
        (["--max_samples", "0"], ConfigError, "--max_samples is 0"),
        (["--text_file", "missing.txt", *FAST], DataError, r"missing\.txt does not exist"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_options_are_refused(
    routed_folder: Path, flags: list[str], error: type[ModcompileError], message: str
) -> None:
    with pytest.raises(error, match=message):
        main([str(routed_folder), *flags])
    assert not (routed_folder / "report.json").exists()


def test_text_of_one_token_is_refused(routed_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\nx\n\n")
    with pytest.raises(DataError, match=r"a\.txt has fewer than two tokens"):
        main([str(routed_folder), "--text_file", str(path), *FAST])


@pytest.mark.parametrize(
    ("remove", "error", "message"),
    [
        (".", ArtifactError, "own is not a folder"),
        ("router_config.json", ArtifactError, r"own has no router_config\.json"),
        ("routers.safetensors", ArtifactError, r"routers\.safetensors can't be read"),
        ("tokenizer*.json", ArtifactError, "own has no tokenizer"),
    ],
)
def test_missing_parts_are_named(own_folder: Path, remove: str, error: type[ModcompileError], message: str) -> None:
    removed = [own_folder] if remove == "." else list(own_folder.glob(remove))
    assert removed
    for path in removed:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(error, match=message):
        main([str(own_folder), *FAST])


def test_sweeps_over_shares_of_the_work(own_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--sweep", "--sweep_active_ratios", "0.5", "--sweep_samples", "2", "--static_candidates", "1"]
    main([str(own_folder), *flags, *FAST])
    swept = json.loads((own_folder / "report.json").read_text())["evaluation"]["sweep"]
    assert list(swept) == ["router", "static", "random"]
    (router,) = swept["router"]
    assert router["active_ratio"] == pytest.approx(0.5, abs=0.05)
    dense = json.loads((own_folder / "report.json").read_text())["evaluation"]["dense"]["perplexity"]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[-4:-1]] == list(swept)
    assert lines[-4].split()[-2:] == [f"{router['perplexity'] / dense:.3f}", "x"]
    assert lines[-1] == f"plotted in {own_folder / 'sweep.png'}"
    assert imread(own_folder / "sweep.png").ndim == 3


@pytest.mark.parametrize("sweep", [False, True])
def test_shows_other_folders_beside_it(own_folder: Path, tmp_path: Path, sweep: bool, capsys: Any) -> None:
    model = build_routed(tiny_base(), RouterConfig(router_start=1))
    for router in model.routers.values():
        torch.nn.init.constant_(router.get_parameter("bias"), -20)
    other = tmp_path / "other"
    write_routed_folder(model, make_tokenizer(), other)
    flags = ["--sweep", "--sweep_active_ratios", "0.5", "--sweep_samples", "2", "--static_candidates", "1"]
    main([str(own_folder), "--beside", str(other), *(flags if sweep else []), *FAST])
    written = json.loads((own_folder / "report.json").read_text())["evaluation"]
    assert list(written["sweep"]) == ["router", *(["static", "random"] if sweep else []), str(other)]
    (measured,) = written["sweep"][str(other)]
    blocks = load_evaluation_blocks(EvaluationTextConfig(sequence_length=64, max_samples=3), own_folder)
    expected = evaluate_model(model, blocks).hard
    assert measured["perplexity"] == pytest.approx(expected.perplexity)
    assert measured["active_ratio"] == 0
    assert measured["block_work"] == pytest.approx(1 / 3)
    if not sweep:
        assert written["sweep"]["router"] == [written["hard"]]
    assert str(other) in capsys.readouterr().out.splitlines()[-2]


def test_refuses_a_folder_of_another_model_beside_it(
    own_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tiny_base()
    with torch.no_grad():
        base.get_parameter("model.layers.1.mlp.up_proj.weight").mul_(1.01)
    write_routed_folder(build_routed(base, RouterConfig()), make_tokenizer(), tmp_path / "other")
    with pytest.raises(ConfigError, match=r"is a folder of another model; name folders of the same base$"):
        main([str(own_folder), "--beside", str(tmp_path / "other"), *FAST])
    with pytest.raises(ArtifactError, match="nowhere is not a folder"):
        main([str(own_folder), "--beside", str(tmp_path / "nowhere"), "--sweep", *FAST])
    # Before anything is measured: what takes minutes would be lost.
    assert "perplexity" not in capsys.readouterr().out


def test_refuses_folders_that_are_called_like_a_way_of_skipping(own_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"^--beside static is also what a sweep calls .*; give \./static$"):
        main([str(own_folder), "--beside", "other", "static", *FAST])


def test_draws_which_tokens_used_which_layers(own_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(own_folder), *FAST, "--route_map_tokens", "70", "--sequence_length", "80"])
    assert f"routes of 70 tokens plotted in {own_folder / 'routes.png'}" in capsys.readouterr().out
    assert imread(own_folder / "routes.png").shape[1] == 1560


@pytest.mark.parametrize(
    ("flag", "value"),
    [("route_map_tokens", "-1"), ("sweep_active_ratios", "1.5"), ("sweep_samples", "0"), ("static_candidates", "0")],
)
def test_refuses_a_sweep_that_is_none(own_folder: Path, flag: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"^--{flag} is "):
        main([str(own_folder), "--sweep", f"--{flag}", value])


def test_halves_are_told_by_their_layer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = RouterConfig(granularity="attn+mlp", router_start=1, router_stop=2, router_hidden_size=0)
    model = build_routed(tiny_base(), config)
    with torch.no_grad():
        cast(Any, model.routers[3]).bias.fill_(-1.0)
    write_routed_folder(model, make_tokenizer(), tmp_path / "halves")
    capsys.readouterr()
    main([str(tmp_path / "halves"), *FAST])
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "hard active ratio by layer: 1.attn:1.000 1.mlp:0.000"
    *_, active_ratio, block_work = lines[-2].removesuffix("  threshold 0.5").split()
    assert float(active_ratio) == pytest.approx(1 - model.work[3], abs=6e-4)
    # Of three blocks, one is routed.
    assert float(block_work) == pytest.approx(1 - model.work[3] / 3, abs=6e-4)
