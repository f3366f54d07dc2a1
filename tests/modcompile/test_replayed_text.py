from typing import Any

import pytest
import torch
from datasets import Dataset

from modcompile.modeling import RoutedForCausalLM
from modcompile.perplexity import evaluate_model
from modcompile.replayed_text import Replay, ReplayedText
from modcompile.restored_routing import restored_routing
from tests.tiny_routed import tiny_adapted, tiny_decided_at_once, tiny_grouped, tiny_routed


@pytest.fixture(scope="module")
def blocks() -> Dataset:
    """Random tokens, some rows padded."""
    torch.manual_seed(0)
    ids = torch.randint(3, 300, (5, 24))
    mask = (torch.arange(24) < torch.tensor([24, 20, 24, 9, 24]).unsqueeze(1)).long()
    columns = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    return Dataset.from_dict({name: tensor.tolist() for name, tensor in columns.items()})


@pytest.fixture(
    params=[tiny_routed, tiny_grouped, tiny_adapted, tiny_decided_at_once],
    ids=["alone", "grouped", "adapted", "decided at once"],
)
def model(request: pytest.FixtureRequest) -> Any:
    """With a cache and without; as it was when a test is over."""
    made = request.param("straight_through")
    with restored_routing(made):
        yield made


def _divergence(model: RoutedForCausalLM, blocks: Dataset, thresholds: list[float]) -> float:
    """Row by row, by the definition."""
    lost, predicted = 0.0, 0
    for row in blocks.with_format("torch"):
        length = int(row["attention_mask"].sum())
        ids = row["input_ids"][:length].unsqueeze(0)
        with torch.no_grad():
            dense = model.base(ids).logits[0, :-1].log_softmax(-1)
            model.set_router_mode(thresholds)
            routed = model(ids, use_cache=False).logits[0, :-1].log_softmax(-1)
        lost += float((dense.exp() * (dense - routed)).sum())
        predicted += length - 1
    return lost / predicted


def test_tells_what_is_lost_and_executed(model: RoutedForCausalLM, blocks: Dataset) -> None:
    text = ReplayedText(model, blocks, batch_size=2)
    gates = len(model.gated_layers)
    assert text.run([0.0] * gates).divergence == pytest.approx(0, abs=1e-5)
    thresholds = [0.5, 0.45, 0.55][:gates]
    found = text.run(thresholds)
    assert found.divergence == pytest.approx(_divergence(model, blocks, thresholds), rel=1e-3)
    assert found.divergence > 1e-3
    expected = evaluate_model(model, blocks, hard_threshold=thresholds).hard.active_ratio
    assert found.active_ratio == pytest.approx(expected)
    assert 0 < expected < 1


def test_from_a_gate_on_it_is_as_from_the_beginning(model: RoutedForCausalLM, blocks: Dataset) -> None:
    text = ReplayedText(model, blocks, batch_size=2)
    gates = len(model.gated_layers)
    torch.manual_seed(0)
    thresholds = [0.5] * gates
    run, seen = text.run(thresholds), set()
    for _ in range(4):
        for gate in range(gates):
            thresholds[gate] = float(0.3 + 0.4 * torch.rand(()))
            run = Replay(tuple(text.parts(thresholds, run, gate)))
            again = text.run(thresholds)
            assert (run.divergence, run.active_ratio) == (again.divergence, again.active_ratio)
            seen.add(run.active_ratio)
    assert len(seen) > 4


def test_what_decides_alike_is_not_run_again(model: RoutedForCausalLM, blocks: Dataset) -> None:
    text = ReplayedText(model, blocks, batch_size=2)
    thresholds = [2.0] * len(model.gated_layers)
    before = text.run(thresholds)
    again = Replay(tuple(text.parts([3.0, *thresholds[1:]], before, 0)))
    assert all(one is other for one, other in zip(again.parts, before.parts, strict=True))


def test_bf16_is_near(model: RoutedForCausalLM, blocks: Dataset) -> None:
    gates = len(model.gated_layers)
    exact, near = (ReplayedText(model, blocks, batch_size=5, bf16=bf16).run([0.5] * gates) for bf16 in (False, True))
    assert 0 < exact.active_ratio < 1
    assert near.active_ratio == pytest.approx(exact.active_ratio, abs=0.05)
    assert near.divergence != exact.divergence
    assert near.divergence == pytest.approx(exact.divergence, rel=0.1)
