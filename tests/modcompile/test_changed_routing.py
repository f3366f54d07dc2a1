import pytest
import torch

from modcompile.changed_routing import random_gates, without_adapters
from modcompile.modeling import RoutedForCausalLM
from tests.tiny_routed import tiny_adapted, tiny_grouped

IDS = torch.randint(3, 300, (8, 64), generator=torch.Generator().manual_seed(0))


def _logits(model: RoutedForCausalLM, threshold: float) -> torch.Tensor:
    model.set_router_mode(threshold)
    model.reset_usage()
    logits: torch.Tensor = model(IDS, use_cache=False).logits
    return logits


def test_without_adapters_tokens_stay_as_they_are() -> None:
    """As in the same model without adapters, whose base is the same."""
    adapted, plain = (make("straight_through", use_cache=False) for make in (tiny_adapted, tiny_grouped))
    before = _logits(adapted, 2.0)
    with without_adapters(adapted):
        assert torch.equal(_logits(adapted, 2.0), _logits(plain, 2.0))
    assert torch.equal(_logits(adapted, 2.0), before)
    assert not torch.equal(before, _logits(plain, 2.0))


@pytest.mark.parametrize("share", [0.2, 0.7])
def test_random_gates_execute_their_share_of_every_layer(share: float) -> None:
    model = tiny_grouped("straight_through", use_cache=False)
    decided = _logits(model, 0.5)
    with random_gates(model, seed=1):
        drawn = _logits(model, 1 - share)
        assert list(model.active_ratio_per_layer.values()) == pytest.approx([share] * 3, abs=0.08)
    with random_gates(model, seed=1):
        assert torch.equal(_logits(model, 1 - share), drawn)
    with random_gates(model, seed=2):
        assert not torch.equal(_logits(model, 1 - share), drawn)
    assert torch.equal(_logits(model, 0.5), decided)


@pytest.mark.parametrize(("threshold", "ratio"), [(0.0, 1.0), (2.0, 0.0)])
def test_random_gates_can_all_be_open_or_closed(threshold: float, ratio: float) -> None:
    model = tiny_grouped("straight_through", use_cache=False)
    with random_gates(model, seed=1):
        _logits(model, threshold)
    assert model.active_ratio == ratio
