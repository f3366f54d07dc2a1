import copy

import pytest
import torch
from datasets import Dataset

from modcompile.calibrated_thresholds import ThresholdScope
from modcompile.calibrating import TOLERANCE, calibrate_thresholds
from modcompile.errors import ConfigError
from modcompile.modeling import RoutedForCausalLM
from modcompile.perplexity import evaluate_model
from tests.tiny_routed import tiny_adapted, tiny_grouped, tiny_routed


@pytest.fixture(scope="module")
def blocks() -> Dataset:
    """Random tokens, a third of the rows padded."""
    torch.manual_seed(0)
    ids = torch.randint(3, 300, (24, 32))
    mask = (torch.arange(32) < torch.tensor([32, 32, 20]).repeat(8).unsqueeze(1)).long()
    columns = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    return Dataset.from_dict({name: tensor.tolist() for name, tensor in columns.items()})


@pytest.fixture(params=[tiny_routed, tiny_grouped, tiny_adapted], ids=["alone", "grouped", "adapted"])
def model(request: pytest.FixtureRequest) -> RoutedForCausalLM:
    model: RoutedForCausalLM = request.param("straight_through", use_cache=False)
    return model


@pytest.mark.parametrize("scope", ["global", "per_layer"])
@pytest.mark.parametrize("target", [0.2, 0.5, 0.9])
def test_meets_its_target_as_an_evaluation_counts_it(
    model: RoutedForCausalLM, blocks: Dataset, scope: ThresholdScope, target: float
) -> None:
    found = calibrate_thresholds(model, blocks, target, scope, batch_size=5)
    hard = evaluate_model(model, blocks, hard_threshold=found.thresholds).hard
    assert found.active_ratio == pytest.approx(hard.active_ratio)
    assert hard.active_ratio == pytest.approx(target, abs=TOLERANCE)
    if scope == "global":
        assert len(set(found.thresholds)) == 1
    else:
        assert list(hard.active_ratio_per_layer.values()) == pytest.approx(
            [target] * len(model.routed_layers), abs=4 * TOLERANCE
        )


def test_shifts_hold_even_where_a_half_would_do(model: RoutedForCausalLM, blocks: Dataset) -> None:
    """The share executed at 0.5 is asked for: no reason to take that for all gates."""
    shifts = torch.arange(float(len(model.gated_layers)))
    target = evaluate_model(model, blocks, hard_threshold=0.5).hard.active_ratio
    found = calibrate_thresholds(model, blocks, target, "searched", shifts=shifts)
    logits = torch.tensor(found.thresholds).logit()
    torch.testing.assert_close(logits - logits[0], shifts, rtol=0, atol=1e-4)
    assert found.active_ratio == pytest.approx(target, abs=TOLERANCE)
    each = calibrate_thresholds(model, blocks, target, "per_layer")
    ratios = evaluate_model(model, blocks, hard_threshold=each.thresholds).hard.active_ratio_per_layer
    assert list(ratios.values()) == pytest.approx([target] * len(ratios), abs=4 * TOLERANCE)


@pytest.mark.parametrize(("target", "threshold"), [(0.0, 1.0), (1.0, 0.0)])
def test_all_or_nothing_holds_for_any_text(
    model: RoutedForCausalLM, blocks: Dataset, target: float, threshold: float
) -> None:
    found = calibrate_thresholds(model, blocks, target, "global")
    assert set(found.thresholds) == {threshold}
    assert found.active_ratio == target


def test_leaves_the_model_as_it_was(model: RoutedForCausalLM, blocks: Dataset) -> None:
    thresholds = [0.25] * len(model.gated_layers)
    model.set_router_mode(thresholds)
    usage = model.usage
    calibrate_thresholds(model, blocks, 0.5, "global")
    assert model.hard_thresholds == thresholds
    assert model.usage is usage


def test_tells_the_nearest_where_gates_say_the_same(blocks: Dataset) -> None:
    """Routers that have not learned anything say the same of every token."""
    model = tiny_routed("soft", use_cache=False)
    routers = [copy.deepcopy(router.state_dict()) for router in model.routers.values()]
    for router in model.routers.values():
        torch.nn.init.zeros_(router.get_parameter("score.down.weight"))
    found = calibrate_thresholds(model, blocks, 0.7, "global")
    for router, state in zip(model.routers.values(), routers, strict=True):
        router.load_state_dict(state)
    assert found.active_ratio in (0.0, 1.0)


@pytest.mark.parametrize("target", [-0.1, 1.1, float("nan")])
def test_refuses_what_is_no_share(blocks: Dataset, target: float) -> None:
    with pytest.raises(ConfigError, match=r"^--target_active_ratio is "):
        calibrate_thresholds(tiny_routed("soft", use_cache=False), blocks, target, "global")
