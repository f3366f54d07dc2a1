import math
from collections.abc import Callable

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerFast

from modcompile.config import GateKind
from modcompile.corpus import builtin_documents
from modcompile.errors import ConfigError, DataError
from modcompile.modeling import RoutedForCausalLM
from modcompile.packing import tokenize_and_pack
from modcompile.perplexity import Measurement, evaluate_model
from tests.model_inputs import ModelInputs
from tests.routed_reference import Mix, run_reference
from tests.tiny_routed import ROUTED_LAYERS, tiny_routed

SEQUENCE_LENGTH = 32

Gate = Callable[[torch.Tensor], torch.Tensor]
"""Router logits `[B, T, 1]` → gate in [0, 1]."""

OPEN: Gate = torch.ones_like
SIGMOID: Gate = torch.sigmoid


def above(threshold: float) -> Gate:
    return lambda router_logits: (router_logits.sigmoid() > threshold).float()


@pytest.fixture(scope="module", params=["soft", "straight_through"])
def routed(request: pytest.FixtureRequest) -> RoutedForCausalLM:
    kind: GateKind = request.param
    return tiny_routed(kind, use_cache=False)


@pytest.fixture(scope="module")
def blocks(tokenizer: PreTrainedTokenizerFast) -> Dataset:
    """Five sequences, the last of 11 tokens."""
    tokens = tokenizer(builtin_documents("test")[0], verbose=False)["input_ids"][: 4 * SEQUENCE_LENGTH + 11]
    return tokenize_and_pack([str(tokenizer.decode(tokens))], tokenizer, SEQUENCE_LENGTH)


@torch.no_grad()
def reference(model: RoutedForCausalLM, blocks: Dataset, gate: Gate) -> Measurement:
    """The same by hooks on the base model, one sequence at a time, without padding."""
    active = dict.fromkeys(ROUTED_LAYERS, 0.0)
    losses, tokens = [], 0

    def mix(layer: int, router: nn.Module) -> Mix:
        def mixed(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
            value = gate(router(before))
            active[layer] += float(value.double().sum())
            return value * after + (1 - value) * before

        return mixed

    mixes = {layer: mix(layer, router) for layer, router in model.routers.items()}
    for row in blocks:
        length = sum(row["attention_mask"])
        input_ids = torch.tensor([row["input_ids"][:length]])
        inputs = ModelInputs(input_ids, torch.ones_like(input_ids), torch.arange(length)[None], [])
        logits, *_ = run_reference(model.base, inputs, mixes)
        log_probabilities = logits[0, :-1].double().log_softmax(-1)
        losses.append(-log_probabilities.gather(1, input_ids[0, 1:, None]).flatten())
        tokens += length
    ratios = {layer: total / tokens for layer, total in active.items()}
    skipped = sum(1 - ratio for ratio in ratios.values())
    mean = sum(ratios.values()) / len(ratios)
    return Measurement(float(torch.cat(losses).mean()), mean, 1 - skipped / model.config.num_hidden_layers, ratios)


def assert_equal(actual: Measurement, expected: Measurement) -> None:
    assert actual.loss == pytest.approx(expected.loss, rel=1e-6)
    assert actual.active_ratio == pytest.approx(expected.active_ratio, rel=1e-6)
    assert actual.block_work == pytest.approx(expected.block_work, rel=1e-6)
    assert actual.active_ratio_per_layer == pytest.approx(expected.active_ratio_per_layer, rel=1e-6)


def test_every_mode_equals_the_base_model_with_hooks(routed: RoutedForCausalLM, blocks: Dataset) -> None:
    assert sum(blocks[-1]["attention_mask"]) < SEQUENCE_LENGTH
    evaluation = evaluate_model(routed, blocks, hard_threshold=0.6, batch_size=3)
    assert_equal(evaluation.dense, reference(routed, blocks, OPEN))
    soft = above(0.5) if routed.router_config.gate == "straight_through" else SIGMOID
    assert_equal(evaluation.soft, reference(routed, blocks, soft))
    assert_equal(evaluation.hard, reference(routed, blocks, above(0.6)))
    assert evaluation.dense.active_ratio == 1.0
    assert 0.0 < evaluation.hard.active_ratio < 1.0
    assert len({round(m.loss, 3) for m in (evaluation.dense, evaluation.soft, evaluation.hard)}) == 3


def test_counts(routed: RoutedForCausalLM, blocks: Dataset) -> None:
    evaluation = evaluate_model(routed, blocks, hard_threshold=0.3)
    tokens = sum(sum(row) for row in blocks["attention_mask"])
    assert evaluation.sequences == len(blocks) == 5
    assert evaluation.predicted_tokens == tokens - len(blocks)
    assert evaluation.hard_threshold == 0.3


@pytest.mark.parametrize("batch_size", [1, 2, 5, 9])
def test_batches_do_not_change_the_result(routed: RoutedForCausalLM, blocks: Dataset, batch_size: int) -> None:
    expected = evaluate_model(routed, blocks, batch_size=4)
    actual = evaluate_model(routed, blocks, batch_size=batch_size)
    for mode, measured in expected.modes.items():
        assert_equal(actual.modes[mode], measured)


def test_padding_counts_nowhere(routed: RoutedForCausalLM, blocks: Dataset) -> None:
    """The text of the last, short sequence alone: in a block of its own length, and in a longer one."""
    last = blocks[-1]
    length = sum(last["attention_mask"])
    short = Dataset.from_list([{name: values[:length] for name, values in last.items()}])
    padded = Dataset.from_list([last])
    actual = evaluate_model(routed, padded).modes
    for mode, measured in evaluate_model(routed, short).modes.items():
        assert_equal(actual[mode], measured)


def test_soft_straight_through_is_hard_at_one_half(blocks: Dataset) -> None:
    evaluation = evaluate_model(tiny_routed("straight_through", use_cache=False), blocks, hard_threshold=0.5)
    assert_equal(evaluation.soft, evaluation.hard)


def test_threshold_for_each_layer(routed: RoutedForCausalLM, blocks: Dataset) -> None:
    evaluation = evaluate_model(routed, blocks, hard_threshold=[0.0, 2.0])
    assert evaluation.hard.active_ratio_per_layer == {0: 1.0, 2: 0.0}
    assert evaluation.hard.active_ratio == 0.5
    assert evaluation.hard_threshold == (0.0, 2.0)


@pytest.mark.parametrize("threshold", [None, 0.25])
@pytest.mark.parametrize("training", [False, True])
def test_model_is_left_as_it_was(
    routed: RoutedForCausalLM, blocks: Dataset, threshold: float | None, training: bool
) -> None:
    routed.train(training)
    routed.set_router_mode(threshold)
    routed.reset_usage()
    routed(torch.tensor([[5, 6, 7]]), use_cache=False)
    usage, thresholds = routed.usage, routed.hard_thresholds
    evaluate_model(routed, blocks)
    assert routed.training == routed.graph.training == training
    assert routed.hard_thresholds == thresholds
    assert routed.usage is usage
    assert usage.tokens == 3
    assert all(parameter.grad is None for parameter in routed.parameters())
    routed.eval()


def test_model_with_a_cache_gives_the_same(blocks: Dataset) -> None:
    expected = evaluate_model(tiny_routed("straight_through", use_cache=False), blocks)
    assert evaluate_model(tiny_routed("straight_through"), blocks) == expected


@pytest.mark.parametrize("threshold", [math.nan, -0.1, math.inf, [0.5, math.nan], [0.5]])
def test_rejects_thresholds(routed: RoutedForCausalLM, blocks: Dataset, threshold: float | list[float]) -> None:
    routed.set_router_mode(0.75)
    with pytest.raises(ConfigError, match="threshold"):
        evaluate_model(routed, blocks, hard_threshold=threshold)
    assert routed.hard_thresholds == [0.75, 0.75]


def test_rejects_a_batch_of_nothing(routed: RoutedForCausalLM, blocks: Dataset) -> None:
    with pytest.raises(ConfigError, match="--batch_size is 0"):
        evaluate_model(routed, blocks, batch_size=0)


def test_rejects_tokens_of_another_model(routed: RoutedForCausalLM) -> None:
    row = {"input_ids": [1, 300], "attention_mask": [1, 1], "labels": [1, 300]}
    with pytest.raises(DataError, match="the token 300, but the model has 300"):
        evaluate_model(routed, Dataset.from_list([row]))


def test_rejects_a_text_of_one_token(routed: RoutedForCausalLM) -> None:
    row = {"input_ids": [5, 0], "attention_mask": [1, 0], "labels": [5, -100]}
    with pytest.raises(DataError, match="fewer than two tokens"):
        evaluate_model(routed, Dataset.from_list([row]))
