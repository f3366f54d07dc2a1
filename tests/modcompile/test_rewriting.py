from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from modcompile.artifacts import load_with_routers, read_report, update_report
from modcompile.config import RouterConfig
from modcompile.errors import ConfigError, OutputError, UnsupportedModelError
from modcompile.rewriting import (
    check_routed_target,
    check_trainable,
    describe,
    rewrite_model,
    write_rewritten,
)
from modcompile.routed_graph import build_routed
from modcompile.share_of_parameters import share_of_parameters
from tests.tiny_models import tiny_model
from tests.tiny_routed import tiny_base, tiny_grouped, tiny_routed

_CONFIG = RouterConfig(router_hidden_size=8, router_pattern="every_other")


def test_untrained_it_is_the_dense_model_hard_and_close_to_it_soft() -> None:
    model, difference = rewrite_model(tiny_base(), RouterConfig(router_hidden_size=8, gate="soft"))
    assert difference["hard"] == 0
    assert difference["soft"] > 0
    _, closer = rewrite_model(tiny_base(), RouterConfig(router_hidden_size=8, gate="soft", router_init_bias=9.0))
    assert closer["soft"] < difference["soft"] / 10
    assert model.hard_thresholds is None
    assert model.usage.tokens == 0


def test_straight_through_starts_as_the_dense_model_in_both_modes() -> None:
    assert rewrite_model(tiny_base(), _CONFIG)[1] == {"hard": 0.0, "soft": 0.0}


def test_refuses_a_graph_that_is_not_the_model() -> None:
    """A hook is part of what the model computes for one layer, and of no trace of another."""
    base = tiny_model("llama", num_layers=4)
    layer = base.get_submodule("model.layers.3")
    layer.register_forward_hook(lambda _, args, output: output + 1)
    with pytest.raises(
        UnsupportedModelError, match="the rewritten graph of LlamaForCausalLM differs from the model by"
    ):
        rewrite_model(base, _CONFIG)


def test_writes_the_folder_and_says_what_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tiny_base()
    write_rewritten(base, None, _CONFIG, tmp_path / "out", overwrite=False)
    model = load_with_routers(tmp_path / "out")
    assert model.routed_layers == (0, 2)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(saved.state_dict(), base.state_dict(), rtol=0, atol=0)
    report = read_report(tmp_path / "out")["rewrite"]
    assert report["routed_layers"] == [0, 2]
    assert report["logit_difference_to_dense"] == {"hard": 0.0, "soft": 0.0}
    assert report["parameters"] == share_of_parameters(model)
    stdout = capsys.readouterr().out
    assert describe(model) in stdout
    assert "untrained: run hard it is the dense model" in stdout


def test_counts_the_trainable_share() -> None:
    numbers = share_of_parameters(tiny_routed("straight_through"))
    trainable = 2 * (32 + 32 + 32 * 8 + 8 + 1)
    base = sum(parameter.numel() for parameter in tiny_base().parameters())
    assert numbers == {"trainable": trainable, "base": base, "trainable_share": trainable / (trainable + base)}
    grouped = describe(tiny_grouped("straight_through"))
    assert grouped.startswith(f"LlamaForCausalLM, 3 routed layers with 2 gates; trainable: {2 * (32 + 1)} of")
    halves = build_routed(tiny_base(), RouterConfig(granularity="attn+mlp", router_start=1))
    assert describe(halves).startswith("LlamaForCausalLM, 2 routed layers with 4 gates; trainable: ")
    assert describe(tiny_routed("straight_through")) == (
        f"LlamaForCausalLM, 2 routed layers; trainable: {trainable:,} of {trainable + base:,} parameters "
        f"({trainable / (trainable + base):.3%})"
    )


@pytest.mark.parametrize("error", [ConfigError, UnsupportedModelError])
def test_writes_nothing_of_a_model_that_it_refuses(tmp_path: Path, error: type[Exception]) -> None:
    config = RouterConfig(router_start=3) if error is ConfigError else _CONFIG
    base = tiny_model("llama", num_layers=3 if error is ConfigError else 1)
    with pytest.raises(error):
        write_rewritten(base, None, config, tmp_path / "out", overwrite=False)
    assert list(tmp_path.iterdir()) == []


def test_protects_trained_routers_and_foreign_folders(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    check_routed_target(folder, overwrite=False)
    folder.mkdir()
    (folder / "thesis.txt").touch()
    with pytest.raises(OutputError, match="was not made by modcompile"):
        check_routed_target(folder, overwrite=False)
    check_trainable(folder, overwrite=False)
    (folder / "router_config.json").touch()
    check_routed_target(folder, overwrite=False)
    update_report(folder, "training", {})
    for check in (check_routed_target, check_trainable):
        with pytest.raises(OutputError, match="holds trained routers; choose another --output_dir or pass --overwrite"):
            check(folder, overwrite=False)
        check(folder, overwrite=True)
