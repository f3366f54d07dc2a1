import pytest

from modcompile.config import RouterConfig
from modcompile.granularity import Granularity
from modcompile.routed_graph import build_routed
from tests.tiny_models import HIDDEN_SIZE
from tests.tiny_routed import tiny_base


def test_whole_blocks_count_alike() -> None:
    model = build_routed(tiny_base(), RouterConfig(router_start=1, skip_adapter="low_rank"))
    assert model.work == {1: 1.0, 2: 1.0}


@pytest.mark.parametrize("granularity", ["attn", "mlp", "attn+mlp"])
def test_halves_count_as_what_is_not_computed_where_they_are_skipped(granularity: Granularity) -> None:
    base = tiny_base()
    model = build_routed(base, RouterConfig(granularity=granularity, skip_adapter="low_rank"))
    queries_and_output = 2 * HIDDEN_SIZE**2
    mlp = 3 * HIDDEN_SIZE * base.config.intermediate_size + HIDDEN_SIZE  # and its norm
    attention = queries_and_output / (queries_and_output + mlp)
    for layer, work in model.work.items():
        assert work == pytest.approx(1 - attention if layer % 2 else attention)
    if granularity == "attn+mlp":
        assert sum(model.work.values()) == pytest.approx(3)
