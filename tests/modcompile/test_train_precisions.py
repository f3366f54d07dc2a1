import re
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from modcompile import LayerwiseQuantizeForCausalLM
from modcompile.artifacts import read_report, read_router_config, save_depth_routers
from modcompile.config import BudgetConfig, RouterConfig
from modcompile.errors import ConfigError
from modcompile.precision_config import PrecisionRouterConfig
from modcompile.precision_router_files import (
    has_precision_routers,
    read_precision_router_config,
    save_precision_routers,
)
from modcompile.quantized_folder import read_quantized_folder
from modcompile.train import main
from tests.folder_contents import contents
from tests.tiny_quantized import BITS, let_routers_decide
from tests.training_commands import error_of, fast_flags, train_until_killed

_PLOTS = {"training_history.png", "training_choices.png"}
_RESULTS = {"precision_routers.safetensors", "report.json", *_PLOTS}
_DEPTH = ["routers.safetensors", "router_config.json"]


@pytest.fixture(autouse=True)
def _in_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What has a default place is written to the current folder."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


@pytest.fixture
def data(train_file: Path) -> list[str]:
    return fast_flags(train_file)


def _train(model: Path | str, *flags: str) -> None:
    main(["--model_name_or_path", str(model), *flags])


def _changed(folder: Path, before: dict[str, str]) -> set[str]:
    return {name for name, content in contents(folder).items() if content != before.get(name)}


def test_trains_a_quantized_folder_in_place_and_not_again_until_told(
    quantized_folder: Path, base_folder: Path, data: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(quantized_folder, "mine"))
    before = contents(folder)
    weights = ["--precision_weight", "3", "--ce_weight", "0.5", "--avg_bits_target", "2.5"]
    _train("mine", *data, *weights, "--router_scope", "token", "--gradient_checkpointing", "--router_dropout", "0.1")
    assert "wrote mine" in capsys.readouterr().out
    assert _changed(folder, before) == _RESULTS
    config = PrecisionRouterConfig("token", "soft", 0.1)
    assert read_precision_router_config(folder) == (config, BITS)
    training = read_report(folder)["training"]
    assert (training["steps"], training["precisions"]) == (2, BITS)
    budget = {"precision_weight": 3.0, "ce_weight": 0.5, "avg_bits_target": 2.5, "static_start_samples": 8}
    assert training["budget"] == budget
    assert "depth_budget" not in training
    metrics = training["metrics"]
    charged = max(metrics["eval_average_bits"] - 2.5, 0) / 16
    assert metrics["eval_loss"] == pytest.approx(0.5 * metrics["eval_lm_loss"] + 3.0 * charged)
    steps = [line for line in training["history"] if "loss" in line]
    assert len(steps) == 2
    assert all({"lm_loss", "average_bits", "bits_loss"} <= line.keys() for line in steps)

    before = contents(folder)
    for argv in (["mine"], [str(quantized_folder)], [str(base_folder), "--precisions", "4"]):
        flags = ["--model_name_or_path", *argv, "--output_dir", "mine", *data]
        assert "mine holds trained routers" in error_of(flags, capsys)
    assert contents(folder) == before
    # Goes on with what the folder holds, for some of the precisions.
    _train("mine", *data, "--overwrite_output_dir", "--precisions", "16", "2")
    # What they choose, from the static start on, may be the same.
    assert _changed(folder, before) | {"training_choices.png"} == _RESULTS
    assert read_precision_router_config(folder) == (config, [2, 16])
    assert LayerwiseQuantizeForCausalLM.from_quantized(folder).precisions == [2, 16]


def test_quantizes_a_plain_model_first(base_folder: Path, data: list[str]) -> None:
    """What is trained before in the same place counts for nothing."""
    before, folder = contents(base_folder), Path("tiny-quantized")
    flags = [*data, "--precisions", "8", "4", "--group_size", "32", "--router_scope", "token"]
    _train(base_folder, *flags)
    first = contents(folder)
    for name in _RESULTS:
        assert name in first
    _train(base_folder, *flags, "--overwrite_output_dir")
    assert contents(base_folder) == before
    assert [path.name for path in Path.cwd().iterdir()] == [folder.name]
    assert read_precision_router_config(folder) == (PrecisionRouterConfig("token"), [4, 8])
    assert _changed(folder, first) == {"report.json"}
    read = read_quantized_folder(folder)
    assert (read.precisions, read.config.group_size, read.config.method) == ([4, 8], 32, "gptq")
    base = AutoModelForCausalLM.from_pretrained(base_folder).state_dict()
    stored = load_file(folder / "model.safetensors")
    assert stored.keys() == base.keys() - read.weights.keys()
    assert all(tensor.equal(base[name]) for name, tensor in stored.items())


@pytest.mark.parametrize(
    ("shared", "config"),
    [
        ("blocks_per_gate", RouterConfig(blocks_per_gate=2)),
        ("gates_per_decision", RouterConfig(gates_per_decision=2)),
    ],
)
def test_refuses_depth_gates_that_layers_share(
    base_folder: Path,
    quantized_folder: Path,
    data: list[str],
    capsys: pytest.CaptureFixture[str],
    shared: str,
    config: RouterConfig,
) -> None:
    expected = f"error: blocks that choose their bits need a depth gate each, decided by itself, but --{shared} is 2; "
    gates = ["--route_depth", f"--{shared}", "2"]
    for argv in ([str(quantized_folder)], [str(base_folder), "--precisions", "4"]):
        assert error_of(["--model_name_or_path", *argv, *data, *gates], capsys).startswith(expected)
    save_depth_routers({}, config, Path())
    shutil.copytree(base_folder, Path(), dirs_exist_ok=True)
    assert error_of(["--model_name_or_path", ".", "--precisions", "4", *data], capsys).startswith(expected)
    with pytest.raises(ConfigError, match="need a depth gate each"):
        LayerwiseQuantizeForCausalLM.from_quantized(quantized_folder, depth=config)


def test_trains_adapters_beside_both_kinds_of_routers(quantized_folder: Path, data: list[str]) -> None:
    """What skips goes through them, in `infer_forward` too, and they are read with the rest."""
    gates = ["--route_depth", "--router_hidden_size", "0", "--skip_adapter", "low_rank", "--adapter_rank", "2"]
    soft = ["--gate", "soft", "--learning_rate", "0.1"]
    _train(quantized_folder, *data, *gates, *soft, "--output_dir", "out")
    model = LayerwiseQuantizeForCausalLM.from_quantized("out")
    assert [tuple(adapter.get_parameter("up.weight").shape) for adapter in model.adapters.values()] == [(32, 2)] * 3
    assert all(bool(adapter.get_parameter("up.weight").any()) for adapter in model.adapters.values())
    before = contents(Path("out"))
    _train(Path("out"), *data, "--trained_routers", "precision", "--overwrite_output_dir")
    assert "routers.safetensors" not in _changed(Path("out"), before)


def test_keeps_the_depth_gates_of_a_routed_folder(routed_folder: Path, data: list[str]) -> None:
    """One kind of routers is trained, then the other."""
    before, out = contents(routed_folder), Path("out")
    flags = ["--precisions", "2", "16", "--precision_mixing", "straight_through", "--trained_routers", "precision"]
    _train(routed_folder, *data, *flags, "--output_dir", "out")
    assert read_precision_router_config(out) == (PrecisionRouterConfig("sequence", "straight_through"), [2, 16])
    assert contents(routed_folder) == before
    first = contents(out)
    assert [first[name] for name in (*_DEPTH, "model.safetensors")] == [
        before[name] for name in (*_DEPTH, "model.safetensors")
    ]
    training = read_report(out)["training"]
    assert training["depth_budget"] == asdict(BudgetConfig(router_lambda=0.01, target_active_ratio=0.7))
    assert 0 < training["metrics"]["eval_active_ratio"] < 1
    _train(out, *data, "--trained_routers", "depth", "--overwrite_output_dir")
    assert _changed(out, first) == {"routers.safetensors", "report.json", *_PLOTS}


def test_trains_in_another_folder_and_resumes_after_a_kill_as_if_there_had_been_none(
    quantized_folder: Path, data: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    whole, killed, before = Path("whole"), Path("killed"), contents(quantized_folder)
    depth = ["--route_depth", "--router_hidden_size", "8"]
    argv = ["--model_name_or_path", str(quantized_folder), *data, "--precision_mixing", "sampled"]
    argv += ["--router_dropout", "0.3", "--max_train_steps", "4", "--save_strategy", "steps", "--save_steps", "2"]
    main([*argv, *depth, "--output_dir", "whole"])
    changed = {name for name in _changed(whole, before) if not name.startswith("checkpoint-")}
    assert changed == {*_RESULTS, *_DEPTH}
    assert contents(quantized_folder) == before
    train_until_killed([*argv, *depth, "--output_dir", "killed"])
    # Killed, the folder is what it was, and a checkpoint.
    found = contents(killed)
    checkpoint = {name for name in found if name.startswith("checkpoint-2/")}
    assert {name: found[name] for name in found.keys() - checkpoint} == before
    assert {Path(name).name for name in checkpoint} == {
        *("precision_routers.safetensors", *_DEPTH),
        *("optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json"),
    }
    capsys.readouterr()
    assert "killed holds trained routers" in error_of([*argv, *depth, "--output_dir", "killed"], capsys)
    main([*argv, *depth, "--output_dir", "killed", "--resume_from_checkpoint", "true"])
    for name in ("precision_routers.safetensors", *_DEPTH):
        assert contents(killed)[name] == contents(whole)[name]
    assert read_router_config(killed) == RouterConfig(router_hidden_size=8, router_dropout=0.3)
    assert before.items() <= contents(killed).items()
    capsys.readouterr()
    others = ["--trained_routers", "depth", "--resume_from_checkpoint", "true"]
    said = error_of([*argv, *depth, "--output_dir", "killed", *others], capsys)
    assert said.endswith("checkpoint-4 is of a training of other parameters; give the flags of its training")


@pytest.fixture
def trained(quantized_folder: Path) -> Path:
    """A folder, `bits`, whose routers choose for tokens from 4 and 16 bits, and were trained straight-through."""
    folder = Path(shutil.copytree(quantized_folder, "bits"))
    model = LayerwiseQuantizeForCausalLM.from_quantized(
        folder, [4, 16], router_scope="token", precision_mixing="straight_through"
    )
    let_routers_decide(model)
    save_precision_routers(model.routers, model.router_config, model.precisions, folder)
    return folder


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--precision_mixing", "sampled"], PrecisionRouterConfig("token", "sampled")),
        (["--precision_mixing", "soft"], PrecisionRouterConfig("token", "soft")),
        (["--router_dropout", "0.1"], PrecisionRouterConfig("token", "straight_through", 0.1)),
    ],
    ids=["sampled", "soft", "dropout"],
)
def test_flags_that_are_left_out_keep_what_the_folder_has(
    trained: Path,
    data: list[str],
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    expected: PrecisionRouterConfig,
) -> None:
    # Nothing is learned: what is left are the routers that the training started from.
    _train(trained, *data, *flags, "--output_dir", "out", "--learning_rate", "0", "--avg_bits_target", "4")
    assert read_precision_router_config(Path("out")) == (expected, [4, 16])
    before, after = (load_file(folder / "precision_routers.safetensors") for folder in (trained, Path("out")))
    assert before.keys() == after.keys()
    assert all(before[name].equal(after[name]) for name in before)
    assert not re.search("not used|starting from", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("flags", "config", "bits"),
    [
        (["--precisions", "2", "4", "16"], PrecisionRouterConfig("token", "straight_through"), BITS),
        (["--router_scope", "sequence"], PrecisionRouterConfig("sequence", "straight_through"), [4, 16]),
    ],
    ids=["precisions", "scope"],
)
def test_routers_that_have_to_be_new_say_so_and_start_from_the_static_allocation(
    trained: Path,
    data: list[str],
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    config: PrecisionRouterConfig,
    bits: list[int],
) -> None:
    _train(trained, *data, *flags, "--output_dir", "out", "--learning_rate", "0", "--avg_bits_target", "4")
    assert read_precision_router_config(Path("out")) == (config, bits)
    said = capsys.readouterr().out
    assert said.count("the routers in bits are not used: they choose for each token from 4, 16 bits;") == 1
    average, chosen = re.findall(r"starting from (.*) bits on average, by layer: (.*)", said)[0]
    assert float(average) <= 4
    stored = load_file("out/precision_routers.safetensors")
    assert [bits[int(stored[f"routers.{layer}.last.bias"].argmax())] for layer in range(3)] == [
        int(each) for each in chosen.split()
    ]


def test_resumes_no_training_of_another_scope(
    quantized_folder: Path, data: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """The default of a flag is refused as well, if it is named."""
    argv = ["--model_name_or_path", str(quantized_folder), "--output_dir", "out", *data]
    main([*argv, "--router_scope", "token", "--save_strategy", "steps", "--save_steps", "2"])
    before = contents(Path("out"))
    capsys.readouterr()
    resume = [*argv, "--resume_from_checkpoint", "true"]
    for flags in (["--router_scope", "sequence"], ["--precision_mixing", "sampled"]):
        assert "holds other routers than are trained here" in (said := error_of([*resume, *flags], capsys))
        assert said.endswith("give the flags of its training")
    assert contents(Path("out")) == before


_OF_A_QUANTIZED_FOLDER = [
    (["--precisions", "4", "4"], "precisions are 4 4; each may be given once"),
    (["--precisions", "3"], "has no weights of 3 bits; it has 2, 4, 16"),
    (["--precisions", "2", "8"], "has no weights of 8 bits; it has 2, 4, 16"),
    (["--precisions", "many"], "--precisions"),
    (["--router_scope", "word"], "--router_scope"),
    (["--precision_mixing", "hard"], "--precision_mixing"),
    (["--trained_routers", "none"], "--trained_routers"),
    (["--trained_routers", "depth"], "has no depth gates; give --route_depth"),
    (["--avg_bits_target", "nan"], "--avg_bits_target is nan"),
    (["--avg_bits_target", "17"], "--avg_bits_target is 17"),
    (["--precision_weight", "-1"], "--precision_weight is -1"),
    (["--ce_weight", "inf"], "--ce_weight is inf"),
    (["--router_dropout", "1"], "--router_dropout is 1"),
    (["--group_size", "32"], "is quantized already"),
    (["--router_hidden_size", "8"], "give --route_depth too"),
    (["--route_depth", "--router_stop", "4"], "--router_stop 4"),
    (["--sequence_length", "129"], "--sequence_length 129 is above the 128 positions"),
    (["--resume_from_checkpoint", "true"], "out holds no checkpoint"),
]
_OF_A_PLAIN_MODEL = [
    (["--router_scope", "token"], "is not quantized"),
    (["--route_depth"], "is not quantized"),
    (["--avg_bits_target", "4"], "is not quantized"),
    (["--group_size", "32"], "is not quantized"),
    (["--precisions", "4", "4"], "--precisions is '4 4'; each may be given once"),
    (["--precisions", "3"], "--precisions is '3'; it must be some of 2, 4, 8, 16"),
    (["--precisions", "4", "--group_size", "7"], "--group_size is 7"),
    (["--precisions", "4", "--trained_routers", "depth"], "has no depth gates; give --route_depth"),
    (["--precisions", "4", "--route_depth", "--router_stop", "4"], "--router_stop 4"),
]


@pytest.mark.parametrize(
    ("kind", "flags", "says"),
    [
        *(("quantized", *case) for case in _OF_A_QUANTIZED_FOLDER),
        *(("base", *case) for case in _OF_A_PLAIN_MODEL),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_nothing_written(
    request: pytest.FixtureRequest,
    data: list[str],
    capsys: pytest.CaptureFixture[str],
    kind: str,
    flags: list[str],
    says: str,
) -> None:
    model: Any = request.getfixturevalue(f"{kind}_folder")
    before = contents(model)
    assert says in error_of(["--model_name_or_path", str(model), "--output_dir", "out", *data, *flags], capsys)
    assert contents(model) == before
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize("kind", ["base", "routed"])
def test_keeps_the_model_that_is_quantized(
    request: pytest.FixtureRequest, data: list[str], capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    model = Path(shutil.copytree(request.getfixturevalue(f"{kind}_folder"), "model"))
    before = contents(model)
    argv = ["--model_name_or_path", "model", *data, "--precisions", "4", "--output_dir", "./model"]
    assert "is the model that is quantized" in error_of([*argv, "--overwrite_output_dir"], capsys)
    assert contents(model) == before


def test_names_routers_that_are_damaged(
    quantized_folder: Path, data: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(quantized_folder, "mine"))
    (folder / "precision_routers.safetensors").write_bytes(b"half")
    assert has_precision_routers(folder)
    argv = ["--model_name_or_path", "mine", *data, "--overwrite_output_dir"]
    assert "can't be read" in (said := error_of(argv, capsys))
    assert said.endswith("remove it and run modcompile.train again")
