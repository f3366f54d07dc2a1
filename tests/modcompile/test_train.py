import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from modcompile import calibrate, evaluate
from modcompile.artifacts import load_with_routers, read_report, read_router_config
from modcompile.config import RouterConfig
from modcompile.errors import ConfigError
from modcompile.granularity import Granularity, halves_of
from modcompile.train import main
from tests.folder_contents import contents
from tests.training_commands import error_of, fast_flags, train_until_killed


@pytest.fixture(autouse=True)
def _in_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What has a default place is written to the current folder."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


@pytest.fixture
def data(train_file: Path) -> list[str]:
    return fast_flags(train_file)


def _hash_of_base(folder: Path) -> str:
    return contents(folder)["model.safetensors"]


def test_rewrites_and_trains_a_base_model(base_folder: Path, data: list[str], tmp_path: Path) -> None:
    before = contents(base_folder)
    flags = ["--router_hidden_size", "8", "--lock_first_layers", "1", "--gate", "soft", "--router_lambda", "3"]
    main(["--model_name_or_path", str(base_folder), "--output_dir", str(tmp_path / "out"), *data, *flags])
    assert contents(base_folder) == before
    assert _hash_of_base(tmp_path / "out") == _hash_of_base(base_folder)
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    model = load_with_routers(tmp_path / "out")
    assert model.router_config == RouterConfig(router_hidden_size=8, lock_first_layers=1, gate="soft")
    assert model.routed_layers == (1, 2)
    report = read_report(tmp_path / "out")
    assert set(report) == {"rewrite", "training"}
    assert report["training"]["steps"] == 2
    assert report["training"]["budget"]["router_lambda"] == 3.0


def test_trains_gates_that_layers_share(base_folder: Path, data: list[str]) -> None:
    flags = ["--router_hidden_size", "0", "--blocks_per_gate", "2", "--gates_per_decision", "2"]
    main(["--model_name_or_path", str(base_folder), "--output_dir", "out", *data, *flags])
    model = load_with_routers("out")
    assert model.router_config.gates_per_decision == 2
    assert model.gated_layers == (range(2), range(2, 3))
    weights = load_file("out/routers.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in weights.items()} == {
        f"routers.{layer}.{name}": shape
        for layer in (0, 2)
        for name, shape in (("bias", (1,)), ("score.down.weight", (1, model.config.hidden_size)))
    }
    assert all(weights[f"routers.{layer}.score.down.weight"].abs().max() > 0 for layer in (0, 2))
    # Of three layers, two share a gate: what is told counts layers.
    training = read_report(Path("out"))["training"]
    assert training["metrics"]["eval_active_ratio"] == pytest.approx(1.0)


def test_trains_adapters_to_predict_what_the_dense_model_does(base_folder: Path, data: list[str]) -> None:
    flags = ["--skip_adapter", "low_rank", "--adapter_rank", "3", "--gate", "soft", "--router_init_bias", "0.5"]
    flags += ["--lm_weight", "0", "--distill_weight", "2"]
    main(["--model_name_or_path", str(base_folder), "--output_dir", "out", *data, *flags])
    model = load_with_routers("out")
    assert len(model.adapters) == 3
    weights = load_file("out/routers.safetensors")
    assert all(weights[f"adapters.{layer}.up.weight"].abs().max() > 0 for layer in range(3))
    training = read_report(Path("out"))["training"]
    assert training["loss"] == {
        "lm_weight": 0.0,
        "distill_weight": 2.0,
        "gate_temperature": 1.0,
        "gate_gradient": "first_order",
    }
    # They start from what least squares found, and not from the identity.
    main(["--model_name_or_path", str(base_folder), "--output_dir", "same", *data, *flags, "--learning_rate", "0"])
    fitted = load_file("same/routers.safetensors")
    main(["--model_name_or_path", "same", "--output_dir", "further", *data, "--learning_rate", "0"])
    assert all(load_file("further/routers.safetensors")[name].equal(fitted[name]) for name in fitted)
    other = ["--adapter_start_samples", "0", "--learning_rate", "0"]
    main(["--model_name_or_path", str(base_folder), "--output_dir", "identity", *data, *flags, *other])
    identity = load_file("identity/routers.safetensors")
    assert [bool(each["adapters.1.up.weight"].any()) for each in (fitted, identity)] == [True, False]
    metrics = training["metrics"]
    expected = 2 * metrics["eval_distill_loss"] + training["budget"]["router_lambda"] * metrics["eval_budget_loss"]
    assert metrics["eval_loss"] == pytest.approx(expected)


def test_starts_from_what_skipping_costs(base_folder: Path, data: list[str]) -> None:
    flags = ["--router_hidden_size", "0", "--skip_adapter", "low_rank", "--adapter_rank", "3", "--learning_rate", "0"]
    flags += ["--router_start_samples", "4", "--target_active_ratio", "0.5"]
    main(["--model_name_or_path", str(base_folder), "--output_dir", "out", *data, *flags])
    weights = load_file("out/routers.safetensors")
    assert all(tensor.any() for tensor in weights.values())
    assert read_report(Path("out"))["training"]["metrics"]["eval_active_ratio"] == pytest.approx(0.5, abs=0.2)
    narrow = ["--router_hidden_size", "1", "--router_start_samples", "4"]
    with pytest.raises(ConfigError, match="--router_start_samples needs routers that can say anything linear"):
        main(["--model_name_or_path", str(base_folder), "--output_dir", "narrow", *data, *narrow])
    assert not Path("narrow").exists()


def test_learns_many_budgets_at_once(base_folder: Path, data: list[str]) -> None:
    flags = ["--budget_loss", "price", "--router_lambda", "0.001", "--lm_weight", "0", "--distill_weight", "1"]
    start = ["--router_hidden_size", "0", "--skip_adapter", "low_rank", "--router_start_samples", "4"]
    for spread in ("1", "4"):
        out = ["--output_dir", f"out{spread}", "--price_spread", spread]
        main(["--model_name_or_path", str(base_folder), *data, *start, *flags, *out])
    assert read_report(Path("out4"))["training"]["budget"]["price_spread"] == 4
    alike, various = (load_file(f"out{spread}/routers.safetensors") for spread in ("1", "4"))
    assert not torch.equal(alike["routers.0.score.down.weight"], various["routers.0.score.down.weight"])
    for refused in (["--router_learning_rate", "1e-4"], [*flags[:4], "--price_spread", "2"]):
        with pytest.raises(ConfigError, match="--price_spread and --router_learning_rate are for depth gates alone"):
            main(["--model_name_or_path", str(base_folder), *data, "--precisions", "8", *refused])


def test_soft_gates_end_hard_at_a_low_temperature(base_folder: Path, data: list[str]) -> None:
    """The routers are scaled by it, so that they say what the gates said that were trained."""
    flags = ["--gate", "soft", "--router_init_bias", "0.5", "--learning_rate", "0"]
    ratios = {}
    for temperature in ("1", "0.1"):
        out = f"out{temperature}"
        main(
            [
                "--model_name_or_path",
                str(base_folder),
                "--output_dir",
                out,
                *data,
                *flags,
                "--gate_temperature",
                temperature,
            ]
        )
        assert load_file(f"{out}/routers.safetensors")["routers.0.bias"].item() == pytest.approx(
            0.5 / float(temperature)
        )
        training = read_report(Path(out))["training"]
        ratios[temperature] = training["metrics"]["eval_active_ratio"]
        assert training["loss"]["gate_temperature"] == float(temperature)
    assert ratios["1"] == pytest.approx(1 / (1 + math.exp(-0.5)), abs=1e-4)
    assert ratios["0.1"] == pytest.approx(1 / (1 + math.exp(-5)), abs=1e-4)


def test_gates_learn_to_the_second_order(base_folder: Path, data: list[str]) -> None:
    """Started from a fit, so that some are closed."""
    flags = ["--router_hidden_size", "0", "--router_start_samples", "4", "--target_active_ratio", "0.6"]
    flags += ["--skip_adapter", "low_rank", "--budget_loss", "price", "--distill_weight", "1", "--lm_weight", "0"]
    found = {}
    for order in ("first_order", "second_order"):
        given = [*data, *flags, "--gate_gradient", order]
        main(["--model_name_or_path", str(base_folder), "--output_dir", order, *given])
        assert read_report(Path(order))["training"]["loss"]["gate_gradient"] == order
        found[order] = load_file(f"{order}/routers.safetensors")
    one, other = found["first_order"], found["second_order"]
    assert all(each.isfinite().all() for each in other.values())
    assert any(not one[name].equal(other[name]) for name in one if name.startswith("routers"))


def test_trains_adapters_alone_where_the_same_layers_are_closed_for_all_tokens(
    base_folder: Path, data: list[str]
) -> None:
    flags = ["--skip_adapter", "low_rank", "--adapter_rank", "3", "--lm_weight", "0", "--distill_weight", "1"]
    static = ["--static_selection_samples", "4", "--target_active_ratio", "0.6"]
    static += ["--save_strategy", "steps", "--save_steps", "1"]
    main(["--model_name_or_path", str(base_folder), "--output_dir", "out", *data, *flags, *static])
    weights, model = load_file("out/routers.safetensors"), load_with_routers("out")
    scores = [name for name in weights if name.endswith("score.down.weight")]
    assert len(scores) == 3
    assert not any(weights[name].any() for name in scores)
    assert sorted(float(weights[f"routers.{layer}.bias"]) for layer in range(3)) == [-20.0, 20.0, 20.0]
    report = read_report(Path("out"))["training"]
    assert report["metrics"]["eval_active_ratio"] == pytest.approx(2 / 3)
    trained = sum(parameter.numel() for adapter in model.adapters.values() for parameter in adapter.parameters())
    assert report["parameters"]["trainable"] == trained
    # Resumed from a checkpoint, too, it is adapters alone: of the model with all of its flags, or without the routers'.
    whole = ["--model_name_or_path", str(base_folder), *flags]
    for given in (["--model_name_or_path", "out"], whole, whole[:2]):
        again = [*given, "--output_dir", "out", "--resume_from_checkpoint", "out/checkpoint-1"]
        main([*again, *data, *static])
        resumed = load_file("out/routers.safetensors")
        assert all(resumed[name].equal(weights[name]) for name in weights if name.startswith("routers."))
        assert read_report(Path("out"))["training"]["parameters"]["trainable"] == trained


def test_resumes_with_the_layers_that_were_chosen(base_folder: Path, data: list[str]) -> None:
    argv = ["--model_name_or_path", str(base_folder), "--output_dir", "out", *data, "--router_layers", "auto"]
    main([*argv, "--save_strategy", "steps", "--save_steps", "1"])
    trained, chosen = load_file("out/routers.safetensors"), read_router_config(Path("out"))
    assert chosen.router_layers not in (None, "auto")
    main([*argv, "--resume_from_checkpoint", "out/checkpoint-1"])
    assert read_router_config(Path("out")) == chosen
    assert all(tensor.equal(trained[name]) for name, tensor in load_file("out/routers.safetensors").items())
    other = [*argv, "--router_hidden_size", "9", "--resume_from_checkpoint", "true"]
    with pytest.raises(ConfigError, match="has routers of its own"):
        main(other)


@pytest.mark.parametrize(("granularity", "adapter"), [("attn", "low_rank"), ("mlp", "scale"), ("attn+mlp", "none")])
def test_trains_halves_of_layers_and_adapters_of_all_kinds(
    base_folder: Path, data: list[str], granularity: Granularity, adapter: str
) -> None:
    """From a fit, at a price, to the second order: what is trained is measured and calibrated like whole blocks."""
    flags = ["--granularity", granularity, "--skip_adapter", adapter, "--router_hidden_size", "0"]
    flags += ["--router_start_samples", "4", "--gate_gradient", "second_order", "--distill_weight", "1"]
    flags += ["--budget_loss", "price", "--router_lambda", "0.3"]
    main(["--model_name_or_path", str(base_folder), *data, *flags, "--output_dir", "out"])
    main(["--model_name_or_path", str(base_folder), *data, *flags, "--output_dir", "fit", "--learning_rate", "0"])
    trained, fitted = (load_file(f"{folder}/routers.safetensors") for folder in ("out", "fit"))
    halves = [half for layer in range(3) for half in halves_of(layer, granularity)]
    assert load_with_routers("out").routed_layers == tuple(halves)
    kinds = {"low_rank": ["down.weight", "up.weight"], "scale": ["scale", "shift"], "none": []}[adapter]
    names = [f"routers.{half}.{name}" for half in halves for name in ("bias", "score.down.weight")]
    names += [f"adapters.{half}.{name}" for half in halves for name in kinds]
    assert set(trained) == set(names)
    moved = [name for name in names if not trained[name].equal(fitted[name])]
    assert any(name.startswith("routers.") for name in moved)
    assert all(any(name.endswith(kind) for name in moved) for kind in kinds)
    calibrate.main(["out", "--target_active_ratio", "0.6", "--sequence_length", "32", "--max_samples", "16"])
    text = ["--sequence_length", "32", "--max_samples", "8"]
    sweep = ["--sweep", "--sweep_active_ratios", "0.6", "--sweep_samples", "2", "--static_candidates", "1"]
    evaluate.main(["out", "--hard_threshold", "auto", *text, *sweep])
    measured = read_report(Path("out"))["evaluation"]
    assert measured["hard"]["active_ratio"] == pytest.approx(0.6, abs=0.06)
    assert list(measured["hard"]["active_ratio_per_layer"]) == [str(half) for half in halves]
    ways = ["router", "static", *(["static without adapters"] if kinds else []), "random"]
    assert list(measured["sweep"]) == ways


def test_default_place_is_named_after_the_model(base_folder: Path, data: list[str], tmp_path: Path) -> None:
    main(["--model_name_or_path", str(base_folder), *data])
    assert [path.name for path in Path.cwd().iterdir()] == ["tiny-routed"]


def test_trains_a_routed_folder_in_place(routed_folder: Path, data: list[str], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(routed_folder, "mine"))
    before = contents(folder)
    main(["--model_name_or_path", "mine", *data])
    after = contents(folder)
    assert {name for name in after if after[name] != before.get(name)} == {
        *("routers.safetensors", "report.json", "training_history.png")
    }


def test_trains_in_place_in_the_current_folder(
    routed_folder: Path, data: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(routed_folder, "mine")
    monkeypatch.chdir("mine")
    main(["--model_name_or_path", ".", *data])
    assert "training" in read_report(Path())


def test_trains_a_routed_folder_to_another(routed_folder: Path, data: list[str], tmp_path: Path) -> None:
    before = contents(routed_folder)
    main(["--model_name_or_path", str(routed_folder), "--output_dir", str(tmp_path / "out"), *data])
    assert contents(routed_folder) == before
    assert _hash_of_base(tmp_path / "out") == _hash_of_base(routed_folder)
    assert read_router_config(tmp_path / "out") == read_router_config(routed_folder)
    trained, untrained = (load_file(folder / "routers.safetensors") for folder in (tmp_path / "out", routed_folder))
    assert any(not trained[name].equal(untrained[name]) for name in trained)


def test_trains_with_the_other_flags(routed_folder: Path, data: list[str], tmp_path: Path) -> None:
    flags = ["--gradient_checkpointing", "--bf16", "--use_cpu", "--gradient_accumulation_steps", "2"]
    flags += ["--warmup_steps", "1", "--weight_decay", "0.1", "--lr_scheduler_type", "cosine"]
    main(["--model_name_or_path", str(routed_folder), "--output_dir", str(tmp_path / "out"), *data, *flags])
    assert read_report(tmp_path / "out")["training"]["steps"] == 2
    assert _hash_of_base(tmp_path / "out") == _hash_of_base(routed_folder)


def test_resumes_after_a_kill_as_if_there_had_been_none(base_folder: Path, data: list[str], tmp_path: Path) -> None:
    argv = ["--model_name_or_path", str(base_folder), *data, "--router_dropout", "0.3"]
    argv += ["--max_train_steps", "6", "--save_strategy", "steps", "--save_steps", "3"]
    main([*argv, "--output_dir", str(tmp_path / "whole")])
    killed = tmp_path / "killed"
    flags = [*argv, "--output_dir", str(killed)]
    train_until_killed(flags)
    # Killed, the folder is whole, with routers that are not trained yet.
    assert load_with_routers(killed).hard_thresholds == [0.5] * 3
    assert {path.name for path in killed.glob("checkpoint-*")} == {"checkpoint-3"}
    assert "training" not in read_report(killed)
    # What was being written when the power went.
    (killed / "checkpoint-6").mkdir()
    (killed / "checkpoint-6" / "routers.safetensors").write_bytes(b"half")
    main([*flags, "--resume_from_checkpoint", "true"])
    assert contents(killed)["routers.safetensors"] == contents(tmp_path / "whole")["routers.safetensors"]
    assert _hash_of_base(killed) == _hash_of_base(base_folder)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--model_name_or_path", "no/such/model"], "no/such/model"),
        (["--router_start", "3"], "--router_start 3 --router_stop 3"),
        (["--router_stop", "4"], "--router_stop 4"),
        (["--router_start", "-1"], "--router_start is -1"),
        (["--lock_first_layers", "2", "--lock_last_layers", "1"], "no layer is left to route"),
        (["--target_active_ratio", "1.5"], "--target_active_ratio is 1.5"),
        (["--target_active_ratio", "nan"], "--target_active_ratio is nan"),
        (["--router_lambda", "-1"], "--router_lambda is -1"),
        (["--router_lambda", "nan"], "--router_lambda is nan"),
        (["--router_init_bias", "0"], "--router_init_bias is 0"),
        (["--gate", "hard"], "--gate"),
        (["--sequence_length", "129"], "--sequence_length 129 is above the 128 positions"),
        (["--sequence_length", "1"], "--sequence_length is 1"),
        (["--max_train_steps", "0"], "--max_train_steps is 0"),
        (["--train_file", "empty.txt"], "empty.txt is empty"),
        (["--train_file", "blank.txt"], "blank texts"),
        (["--train_file", "one.txt"], "fewer than two tokens"),
        (["--train_file", "none.txt"], "none.txt does not exist"),
        (["--validation_file", "one.txt"], "fewer than two tokens"),
        (["--dataset_name", "builtin"], "--dataset_name and --train_file exclude each other"),
        (["--resume_from_checkpoint", "true"], "is not a folder"),
        (["--no_such_flag"], "--no_such_flag"),
        (["--learning_rate", "fast"], "--learning_rate"),
        (
            [*("--budget_loss", "price", "--target_warmup_ratio", "0.5")],
            "--target_warmup_ratio is of a target, and a price has none",
        ),
    ],
)
def test_bad_input_is_one_line_and_nothing_written(
    base_folder: Path, data: list[str], capsys: pytest.CaptureFixture[str], flags: list[str], says: str
) -> None:
    for name, text in (("empty.txt", ""), ("blank.txt", " \n\n"), ("one.txt", "a")):
        Path(name).write_text(text)
    before = contents(Path())
    argv = ["--model_name_or_path", str(base_folder), "--output_dir", "out", *data, *flags]
    assert says in error_of(argv, capsys)
    assert contents(Path()) == before
    assert not Path("out").exists()


def test_needs_data_and_a_model(base_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--model_name_or_path", str(base_folder), "--output_dir", "out", "--sequence_length", "16"]
    assert "no data" in error_of(argv, capsys)
    assert "--model_name_or_path" in error_of(["--output_dir", "out"], capsys)
    assert list(Path().iterdir()) == []


def test_refuses_other_routers_than_those_of_the_folder(
    routed_folder: Path, data: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--model_name_or_path", str(routed_folder), "--output_dir", "out", *data]
    assert "has routers of its own" in error_of([*argv, "--router_hidden_size", "16"], capsys)
    assert not Path("out").exists()


def test_refuses_a_folder_of_another_version(
    routed_folder: Path, data: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(routed_folder, "mine"))
    stored: dict[str, Any] = json.loads((folder / "router_config.json").read_text())
    (folder / "router_config.json").write_text(json.dumps(stored | {"format_version": 7}))
    before = contents(folder)
    assert "has format 7" in error_of(["--model_name_or_path", "mine", *data], capsys)
    assert contents(folder) == before


def test_keeps_what_is_not_its_own(base_folder: Path, data: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    Path("out").mkdir()
    Path("out", "thesis.txt").write_text("years of work")
    for model in (base_folder, "."):
        argv = ["--model_name_or_path", str(model), "--output_dir", "out", *data]
        assert re.search(r"was not made by modcompile|has no config\.json", error_of(argv, capsys))
    assert contents(Path("out")).keys() == {"thesis.txt"}


def test_keeps_trained_routers_until_told_otherwise(
    routed_folder: Path, base_folder: Path, data: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    main(["--model_name_or_path", str(routed_folder), "--output_dir", "out", *data])
    before = contents(Path("out"))
    capsys.readouterr()
    for model in (routed_folder, base_folder, "out"):
        argv = ["--model_name_or_path", str(model), "--output_dir", "out", *data]
        assert "out holds trained routers" in error_of(argv, capsys)
    assert contents(Path("out")) == before
    main(["--model_name_or_path", "out", *data, "--overwrite_output_dir", "--seed", "1"])
    assert contents(Path("out"))["routers.safetensors"] != before["routers.safetensors"]
