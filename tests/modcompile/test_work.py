import pytest

from modcompile.config import RouterConfig
from modcompile.granularity import Granularity
from modcompile.routed_graph import build_routed
from tests.tiny_models import HIDDEN_SIZE
from tests.tiny_routed import tiny_base


def test_whole_blocks_count_alike() -> None:
    model = build_routed(tiny_base(), RouterConfig(router_start=1, skip_adapter="low_rank"))
    assert model.work == {1: 1.0, 2: 1.0}


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("granularity", ["attn", "mlp", "attn+mlp"])
def test_halves_count_as_their_parameters(granularity: Granularity, use_cache: bool) -> None:
    base = tiny_base()
    config = RouterConfig(granularity=granularity, skip_adapter="low_rank")
    model = build_routed(base, config, use_cache=use_cache)
    attention = 3 * HIDDEN_SIZE**2 + HIDDEN_SIZE  # with half as many heads of keys and values, and a norm
    mlp = 3 * HIDDEN_SIZE * base.config.intermediate_size + HIDDEN_SIZE
    for layer, work in model.work.items():
        assert work == pytest.approx((mlp if layer % 2 else attention) / (mlp + attention))
    if granularity == "attn+mlp":
        assert sum(model.work.values()) == pytest.approx(3)
