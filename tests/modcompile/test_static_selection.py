from itertools import combinations

import pytest
import torch
from datasets import Dataset

from modcompile.perplexity import evaluate_model
from modcompile.static_selection import select_static, thresholds_of
from tests.tiny_routed import tiny_decided_at_once


@pytest.fixture(scope="module")
def blocks() -> Dataset:
    torch.manual_seed(0)
    ids = torch.randint(3, 300, (4, 16))
    columns = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    return Dataset.from_dict({name: tensor.tolist() for name, tensor in columns.items()})


def _loss(blocks: Dataset, closed: tuple[int, ...]) -> float:
    """Of a model of three gates."""
    model = tiny_decided_at_once("straight_through", use_cache=False)
    hard = evaluate_model(model, blocks, hard_threshold=thresholds_of(closed, 3)).hard
    assert hard.active_ratio == pytest.approx(1 - len(closed) / 3)
    return hard.loss


def test_closes_the_cheapest_gate_then_the_cheapest_beside_it(blocks: Dataset) -> None:
    model = tiny_decided_at_once("straight_through", use_cache=False)
    first, second, third = select_static(model, blocks, 1.0, candidates=3)
    losses = {gates: _loss(blocks, gates) for size in (1, 2, 3) for gates in combinations(range(3), size)}
    best = min(range(3), key=lambda gate: losses[(gate,)])
    assert first.closed == (best,)
    assert first.loss == pytest.approx(losses[(best,)])
    beside = min((gate for gate in range(3) if gate != best), key=lambda gate: losses[tuple(sorted((best, gate)))])
    assert second.closed == (best, beside)
    assert second.loss == pytest.approx(losses[tuple(sorted(second.closed))])
    assert sorted(third.closed) == [0, 1, 2]


def test_tries_no_more_than_it_is_told(blocks: Dataset) -> None:
    """With one candidate it is the order of what each costs alone."""
    model = tiny_decided_at_once("straight_through", use_cache=False)
    *_, last = select_static(model, blocks, 1.0, candidates=1)
    assert list(last.closed) == sorted(range(3), key=lambda gate: _loss(blocks, (gate,)))


def test_stops_at_as_many_as_wanted_and_leaves_the_model_as_it_was(blocks: Dataset) -> None:
    model = tiny_decided_at_once("straight_through", use_cache=False)
    model.set_router_mode([0.25, 0.5, 0.75])
    usage = model.usage
    assert len(select_static(model, blocks, 0.2, candidates=2)) == 1
    assert model.hard_thresholds == [0.25, 0.5, 0.75]
    assert model.usage is usage
