import pytest
import torch
from datasets import Dataset
from torch import nn

from modcompile.calibrating import TOLERANCE, calibrate_thresholds
from modcompile.config import RouterConfig
from modcompile.errors import ConfigError
from modcompile.modeling import RoutedForCausalLM
from modcompile.perplexity import evaluate_model
from modcompile.replayed_text import Part, Replay, ReplayedText
from modcompile.routed_graph import build_routed
from modcompile.threshold_search import paying, search_thresholds
from tests.tiny_routed import tiny_base


@pytest.fixture(scope="module")
def blocks() -> Dataset:
    torch.manual_seed(0)
    ids = torch.randint(3, 300, (12, 24)).tolist()
    return Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * 24] * 12, "labels": ids})


@pytest.fixture(scope="module")
def model() -> RoutedForCausalLM:
    """Routers that say much the same of all three layers, though the second changes far more than the others."""
    base = tiny_base()
    with torch.no_grad():
        for index, layer in enumerate(base.model.layers):
            for product in (layer.self_attn.o_proj, layer.mlp.down_proj):
                product.weight.mul_(1.0 if index == 1 else 0.05)
    torch.manual_seed(0)
    model = build_routed(base, RouterConfig(router_hidden_size=0), use_cache=False)
    for router in model.routers.values():
        nn.init.normal_(router.get_parameter("score.down.weight"), std=0.3)
        nn.init.zeros_(router.get_parameter("bias"))
    return model


@pytest.mark.parametrize("target", [0.5, 0.7])
def test_loses_less_for_the_same_work(model: RoutedForCausalLM, blocks: Dataset, target: float) -> None:
    """On the text that was searched, and on another one."""
    searched, others = blocks.select(range(6)), blocks.select(range(6, 12))
    found = search_thresholds(model, searched, target, searched, batch_size=4)
    start = calibrate_thresholds(model, searched, target, "global", batch_size=4)
    assert found.scope == "searched"
    assert found.active_ratio == pytest.approx(target, abs=TOLERANCE)
    hard = evaluate_model(model, searched, hard_threshold=found.thresholds).hard
    assert hard.active_ratio == pytest.approx(found.active_ratio)
    assert found.thresholds[1] < start.thresholds[1]
    assert min(found.thresholds[0], found.thresholds[2]) > start.thresholds[0]
    for text in (searched, others):
        runs = ReplayedText(model, text, batch_size=6)
        ours, theirs = (runs.run(each.thresholds) for each in (found, start))
        assert ours.divergence < 0.9 * theirs.divergence


def test_meets_the_budget_on_another_text_than_it_searches(model: RoutedForCausalLM, blocks: Dataset) -> None:
    """Only how far thresholds are from each other is of the text that is searched."""
    searched, budgeted = blocks.select(range(2)), blocks.select(range(4, 12))
    found = search_thresholds(model, budgeted, 0.6, searched)
    hard = evaluate_model(model, budgeted, hard_threshold=found.thresholds).hard
    assert hard.active_ratio == pytest.approx(0.6, abs=TOLERANCE)
    logits = torch.tensor(found.thresholds, dtype=torch.float64).logit()
    steps = logits - logits[0]
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-6)
    assert steps.abs().max() >= 1


@pytest.mark.parametrize("target", [0.0, 1.0])
def test_all_or_nothing_needs_no_search(model: RoutedForCausalLM, blocks: Dataset, target: float) -> None:
    found = search_thresholds(model, blocks, target, blocks)
    assert (found.scope, found.active_ratio) == ("searched", target)
    assert set(found.thresholds) == {1.0 - target}


def test_leaves_thresholds_where_every_token_is_alike(blocks: Dataset) -> None:
    model = build_routed(tiny_base(), RouterConfig(router_hidden_size=0), use_cache=False)
    for router in model.routers.values():
        nn.init.zeros_(router.get_parameter("score.down.weight"))
        nn.init.constant_(router.get_parameter("bias"), 5.0)
    model.set_router_mode(0.25)
    usage = model.usage
    found = search_thresholds(model, blocks, 0.5, blocks)
    assert len(set(found.thresholds)) == 1
    assert model.hard_thresholds == [0.25] * 3
    assert model.usage is usage


def test_refuses_what_is_no_share(model: RoutedForCausalLM, blocks: Dataset) -> None:
    with pytest.raises(ConfigError, match=r"^--target_active_ratio is 1\.5"):
        search_thresholds(model, blocks, 1.5, blocks)


def _parts(divergence: list[float], active_ratio: float = 0.5) -> tuple[Part, ...]:
    """One a sequence."""
    return tuple(Part(torch.tensor([each]), torch.tensor([active_ratio]), {}) for each in divergence)


_HERE = Replay(_parts([1.0] * 6))


@pytest.mark.parametrize("divergence", [[0.9, 0.95, 0.8, 0.9, 1.05, 0.9], [1.1, 0.85, 0.6, 0.7, 0.9, 0.9]])
def test_what_saves_pays(divergence: list[float]) -> None:
    parts = _parts(divergence)
    found = paying(parts, _HERE, 0.0)
    assert found is not None
    assert found.parts == parts


@pytest.mark.parametrize(
    "divergence",
    [
        pytest.param([0.9, 0.9, 1.1, 1.1, 1.1, 1.1], id="only at first"),
        pytest.param([1.1, 1.1, 0.5, 0.5, 0.5, 0.5], id="too late"),
        pytest.param([1.0] * 6, id="nothing"),
    ],
)
def test_what_saves_nothing_does_not_pay(divergence: list[float]) -> None:
    assert paying(_parts(divergence), _HERE, 0.0) is None


def test_work_is_paid_for() -> None:
    less_work = _parts([1.1, 1.11, 1.09, 1.1, 1.1, 1.1], 0.3)
    assert paying(less_work, _HERE, 0.4) is None
    assert paying(less_work, _HERE, 0.6) is not None


@pytest.mark.parametrize(("divergence", "run"), [([1.1, 1.1], 2), ([1.1, 0.7, 1.1, 1.2], 4)])
def test_what_does_not_pay_is_given_up(divergence: list[float], run: int) -> None:
    """After a third of the batches, not before."""
    parts = iter(_parts([*divergence, *[0.0] * (6 - run)]))
    assert paying(parts, _HERE, 0.0) is None
    assert len(list(parts)) == 6 - run
