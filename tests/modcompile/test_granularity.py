import pytest

from modcompile.config import RouterConfig
from modcompile.errors import ConfigError
from modcompile.granularity import Granularity, label_of, layer_of
from modcompile.precision_graphs import check_composable
from modcompile.rewriting import rewrite_model
from tests.tiny_routed import tiny_base

_ROUTED: dict[Granularity, list[int]] = {"block": [1, 2], "attn": [2, 4], "mlp": [3, 5], "attn+mlp": [2, 3, 4, 5]}


@pytest.mark.parametrize("granularity", _ROUTED)
def test_gates_decide_on_the_halves_that_are_asked_for(granularity: Granularity) -> None:
    config = RouterConfig(granularity=granularity, router_start=1)
    assert config.gated_layers(3) == [range(layer, layer + 1) for layer in _ROUTED[granularity]]
    assert config.routed_layers(3) == [1, 2]


@pytest.mark.parametrize("granularity", _ROUTED)
def test_untrained_the_model_is_the_dense_one(granularity: Granularity) -> None:
    config = RouterConfig(granularity=granularity, router_start=1, skip_adapter="scale", gates_per_decision=2)
    model, difference = rewrite_model(tiny_base(), config)
    assert difference["hard"] == 0
    assert list(model.routed_layers) == _ROUTED[granularity]
    assert list(model.adapters) == _ROUTED[granularity]


def test_halves_are_labelled_by_their_layer() -> None:
    assert [label_of(layer, "attn+mlp") for layer in (0, 1, 58, 59)] == ["0.attn", "0.mlp", "29.attn", "29.mlp"]
    assert label_of(3, "block") == "3"


def test_halves_are_of_a_layer() -> None:
    assert [layer_of(layer, "mlp") for layer in (0, 1, 58, 59)] == [0, 0, 29, 29]
    assert layer_of(3, "block") == 3


def test_only_whole_blocks_share_a_gate() -> None:
    with pytest.raises(ConfigError, match="--blocks_per_gate 2 is for whole blocks, and --granularity is attn;"):
        RouterConfig(blocks_per_gate=2, granularity="attn")


def test_blocks_of_several_precisions_are_skipped_whole() -> None:
    with pytest.raises(ConfigError, match="make depth gates with --granularity block"):
        check_composable(RouterConfig(granularity="mlp"))
