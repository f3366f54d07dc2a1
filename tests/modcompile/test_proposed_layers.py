import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from modcompile.artifacts import read_router_config
from modcompile.config import RouterConfig
from modcompile.errors import ConfigError, DataError
from modcompile.granularity import Granularity
from modcompile.proposed_layers import propose_layers, with_proposed_layers
from modcompile.rewriting import write_rewritten
from tests.tiny_routed import tiny_base
from tests.tiny_tokenizer import make_tokenizer


def test_leaves_out_a_layer_that_every_token_needs() -> None:
    """The middle one, a thousand times as strong as the others are."""
    base = tiny_base()
    with torch.no_grad():
        for index, layer in enumerate(base.model.layers):
            factor = 1.0 if index == 1 else 0.001
            layer.self_attn.o_proj.weight.mul_(factor)
            layer.mlp.down_proj.weight.mul_(factor)
    assert propose_layers(base, make_tokenizer(), [0, 1, 2]) == [0, 2]
    assert propose_layers(base, make_tokenizer(), [1, 2]) == [2]


@pytest.mark.parametrize(("granularity", "layers"), [("attn", [0, 1]), ("mlp", [0, 2]), ("attn+mlp", [0, 1, 2])])
def test_looks_at_what_has_gates(granularity: Granularity, layers: list[int]) -> None:
    """Every token needs the MLP of layer 1 and the attention of layer 2."""
    base = tiny_base()
    with torch.no_grad():
        for index, layer in enumerate(base.model.layers):
            layer.self_attn.o_proj.weight.mul_(1.0 if index == 2 else 0.001)
            layer.mlp.down_proj.weight.mul_(1.0 if index == 1 else 0.001)
    assert propose_layers(base, make_tokenizer(), [0, 1, 2], granularity) == layers


def test_the_folder_names_the_layers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = RouterConfig(router_layers="auto", router_start=1, router_hidden_size=0)
    model = write_rewritten(tiny_base(), make_tokenizer(), config, tmp_path / "routed", overwrite=False)
    stored = read_router_config(tmp_path / "routed")
    assert stored == replace(config, router_layers=stored.router_layers)
    assert stored.routed_layers(3) == list(model.routed_layers)
    assert set(model.routed_layers) <= {1, 2}
    told = f"--router_layers auto is {stored.router_layers}, {len(model.routed_layers)} of 2 layers"
    assert told in capsys.readouterr().out.splitlines()


def test_a_list_stays_a_list_and_needs_no_text(tmp_path: Path) -> None:
    config = RouterConfig(router_layers="1", router_hidden_size=0)
    write_rewritten(tiny_base(), None, config, tmp_path / "routed", overwrite=False)
    assert read_router_config(tmp_path / "routed") == config


def test_says_that_it_takes_more_memory_than_there_is() -> None:
    base = copy.deepcopy(tiny_base())
    base.config.hidden_size = 10**12  # of which nothing is allocated
    with pytest.raises(ConfigError, match=r"^--router_layers auto needs [\d,.]+ GB of memory, .*; give a list$"):
        with_proposed_layers(RouterConfig(router_layers="auto"), base, make_tokenizer())


def test_needs_a_tokenizer() -> None:
    with pytest.raises(DataError, match="--router_layers auto reads a text, and the model has no tokenizer"):
        with_proposed_layers(RouterConfig(router_layers="auto"), tiny_base(), None)


def test_has_to_be_resolved_first() -> None:
    with pytest.raises(ConfigError, match="--router_layers auto chooses while a model is rewritten"):
        RouterConfig(router_layers="auto").routed_layers(3)
