from typing import Any

import pytest
import torch
from datasets import Dataset

from modcompile.config import RouterConfig
from modcompile.fit_adapters import fit_adapters
from modcompile.modeling import RoutedForCausalLM
from modcompile.perplexity import evaluate_model
from modcompile.routed_graph import build_routed
from modcompile.static_routers import close_statically, freeze_routers
from modcompile.static_selection import select_static
from tests.tiny_routed import tiny_base


@pytest.fixture(scope="module")
def blocks() -> Dataset:
    ids = torch.randint(3, 300, (4, 16), generator=torch.Generator().manual_seed(0))
    columns = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    return Dataset.from_dict({name: tensor.tolist() for name, tensor in columns.items()})


def _model(**options: Any) -> RoutedForCausalLM:
    torch.manual_seed(0)
    config = RouterConfig(**{"skip_adapter": "low_rank", "adapter_rank": 4, **options})
    model = build_routed(tiny_base(), config, use_cache=False)
    with torch.no_grad():
        for router in model.routers.values():
            torch.nn.init.normal_(router.get_parameter("score.down.weight"))
    return model


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"router_hidden_size": 0, "blocks_per_gate": 2},
        {"gate": "straight_through"},
        {"gate": "hard_concrete"},
        {"granularity": "attn+mlp"},
    ],
    ids=str,
)
def test_closes_what_a_selection_closes_for_every_token(blocks: Dataset, options: dict[str, Any]) -> None:
    model = _model(**options)
    fit_adapters(model, blocks)
    selections = select_static(model, blocks, 1.0, candidates=6)
    closed = close_statically(model, blocks, 0.4)
    gates = sorted(model.gated_layers.index(layers) for layers in closed)
    (wanted,) = (each for each in selections if sorted(each.closed) == gates)
    assert 0 < len(closed) < len(model.gated_layers)
    result = evaluate_model(model, blocks)
    layers = {layer for each in closed for layer in each}
    for mode in (result.soft, result.hard):
        ratios = mode.active_ratio_per_layer
        assert ratios == pytest.approx({layer: float(layer not in layers) for layer in ratios}, abs=1e-6)
        assert mode.loss == pytest.approx(wanted.loss, rel=1e-5)


def test_closes_no_more_than_comes_nearest(blocks: Dataset) -> None:
    """Of two gates, the one of two layers: either alone is nearer to half of the work than both."""
    assert len(close_statically(_model(router_hidden_size=0, blocks_per_gate=2), blocks, 0.5)) == 1


@pytest.mark.parametrize(("target", "count"), [(1.0, 0), (0.9, 0), (0.8, 1), (0.3, 2), (0.0, 3)])
def test_closes_as_many_as_the_target_asks_for(blocks: Dataset, target: float, count: int) -> None:
    assert len(close_statically(_model(), blocks, target)) == count


def test_adapters_are_all_that_is_trained(blocks: Dataset) -> None:
    model = _model(gate="straight_through")
    close_statically(model, blocks, 0.5)
    freeze_routers(model)
    ids = torch.tensor(blocks[0]["input_ids"]).unsqueeze(0)
    model.train()(ids, labels=ids).loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if ".skip." in name or name.startswith("adapters.")}
    moved = [parameter for parameter in model.parameters() if parameter.grad is not None and parameter.grad.any()]
    assert moved
