from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from modcompile.config import RouterConfig
from modcompile.corpus import builtin_documents
from modcompile.errors import DataError
from modcompile.layerwise import LayerwiseQuantizeForCausalLM
from modcompile.packing import tokenize_and_pack
from modcompile.precision_evaluation import PrecisionEvaluation, PrecisionMeasurement, evaluate_precisions
from modcompile.precision_sensitivity import measure_block_sensitivity
from modcompile.static_allocation import allocation_at, greedy_allocations
from tests.tiny_quantized import BITS, NUM_LAYERS, let_routers_decide, plain_model, write_tiny_quantized

SEQUENCE_LENGTH = 16


def _blocks(tokenizer: PreTrainedTokenizerFast, document: str) -> Dataset:
    """Five sequences, the last of 7 tokens."""
    tokens = tokenizer(document, verbose=False)["input_ids"][: 4 * SEQUENCE_LENGTH + 7]
    return tokenize_and_pack([str(tokenizer.decode(tokens))], tokenizer, SEQUENCE_LENGTH)


@pytest.fixture(scope="module")
def blocks(tokenizer: PreTrainedTokenizerFast) -> Dataset:
    return _blocks(tokenizer, builtin_documents("test")[0])


@pytest.fixture(scope="module")
def calibration(tokenizer: PreTrainedTokenizerFast) -> Dataset:
    return _blocks(tokenizer, builtin_documents("validation")[0])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_quantized(tmp_path_factory.mktemp("quantized") / "tiny", None)


@pytest.fixture(scope="module")
def model(folder: Path) -> LayerwiseQuantizeForCausalLM:
    layerwise = LayerwiseQuantizeForCausalLM.from_quantized(folder)
    let_routers_decide(layerwise)
    return layerwise


@pytest.fixture(scope="module")
def evaluation(model: LayerwiseQuantizeForCausalLM, blocks: Dataset, calibration: Dataset) -> PrecisionEvaluation:
    return evaluate_precisions(model, blocks, calibration)


@pytest.fixture(scope="module")
def gated(folder: Path) -> LayerwiseQuantizeForCausalLM:
    """The same with a depth gate at every block, which skips some of the tokens."""
    layerwise = LayerwiseQuantizeForCausalLM.from_quantized(folder, depth=RouterConfig(router_hidden_size=8))
    let_routers_decide(layerwise)
    return layerwise


@torch.no_grad()
def _reference_loss(model: PreTrainedModel, blocks: Dataset) -> float:
    """By the loss of transformers, one sequence at a time, without padding."""
    total, predicted = 0.0, 0
    for row in blocks:
        length = sum(row["attention_mask"])
        input_ids = torch.tensor([row["input_ids"][:length]])
        total += float(model(input_ids=input_ids, labels=input_ids).loss) * (length - 1)
        predicted += length - 1
    return total / predicted


def test_fixed_precisions_are_plain_models_of_these_weights(
    evaluation: PrecisionEvaluation, folder: Path, blocks: Dataset
) -> None:
    assert list(evaluation.fixed) == BITS
    for bits, measured in evaluation.fixed.items():
        assert measured.loss == pytest.approx(
            _reference_loss(plain_model(folder, (bits,) * NUM_LAYERS), blocks), rel=1e-5
        )
        assert measured.average_bits == bits
        assert measured.shares == ({bits: 1.0},) * NUM_LAYERS
    assert len({round(measured.loss, 3) for measured in evaluation.fixed.values()}) == len(BITS)


def test_static_allocations_are_plain_models_of_these_weights(
    evaluation: PrecisionEvaluation, folder: Path, blocks: Dataset
) -> None:
    mixed = [allocation for allocation in evaluation.static if len(set(allocation)) > 1]
    assert len(mixed) > 1
    for allocation in mixed:
        measured = evaluation.static[allocation]
        assert measured.loss == pytest.approx(_reference_loss(plain_model(folder, allocation), blocks), rel=1e-5)
        assert measured.average_bits == pytest.approx(sum(allocation) / NUM_LAYERS)


def test_static_allocations_are_chosen_by_the_calibration_text(
    evaluation: PrecisionEvaluation, model: LayerwiseQuantizeForCausalLM, calibration: Dataset
) -> None:
    assert evaluation.sensitivity == measure_block_sensitivity(model, NUM_LAYERS, calibration)
    model.fix_precision(None)


def test_static_allocations_are_the_greedy_ones_at_the_averages_asked_for(evaluation: PrecisionEvaluation) -> None:
    allocations = greedy_allocations(evaluation.sensitivity)
    assert evaluation.at_router == allocation_at(allocations, evaluation.router.average_bits)
    averages = [2, 4, 16, 5.5, 9, 12.5, evaluation.router.average_bits]
    assert set(evaluation.static) == {allocation_at(allocations, average) for average in averages}
    assert list(evaluation.static) == sorted(evaluation.static, key=sum)


def test_router_is_measured_one_sequence_a_call(
    evaluation: PrecisionEvaluation, model: LayerwiseQuantizeForCausalLM, blocks: Dataset
) -> None:
    total, predicted = 0.0, 0
    bits_by_layer: list[list[int]] = [[] for _ in range(NUM_LAYERS)]
    for row in blocks:
        length = sum(row["attention_mask"])
        output = model.infer_forward(torch.tensor([row["input_ids"][:length]]))
        assert output.logits is not None
        assert output.num_bits is not None
        log_probabilities = output.logits[0, :-1].double().log_softmax(-1)
        total -= sum(float(log_probabilities[place, row["input_ids"][place + 1]]) for place in range(length - 1))
        predicted += length - 1
        for layer, chosen in enumerate(output.num_bits):
            bits_by_layer[layer] += chosen.flatten().tolist()
    assert evaluation.router.loss == pytest.approx(total / predicted, rel=1e-6)
    tokens = 4 * SEQUENCE_LENGTH + 7
    assert all(len(bits) == tokens for bits in bits_by_layer)
    assert evaluation.router.average_bits == pytest.approx(sum(map(sum, bits_by_layer)) / tokens / NUM_LAYERS)
    assert evaluation.router.average_bits_per_block == pytest.approx([sum(bits) / tokens for bits in bits_by_layer])
    for shares, bits in zip(evaluation.router.shares, bits_by_layer, strict=True):
        assert shares == pytest.approx({choice: bits.count(choice) / tokens for choice in set(bits)})
    assert any(len(shares) > 1 for shares in evaluation.router.shares)


def test_depth_gates_skip_for_the_router_alone(
    gated: LayerwiseQuantizeForCausalLM, folder: Path, blocks: Dataset, calibration: Dataset
) -> None:
    gated.set_hard_threshold([0.3, 0.5, 0.7])
    found = evaluate_precisions(gated, blocks, calibration)
    assert gated.hard_thresholds == pytest.approx([0.3, 0.5, 0.7])
    assert [fixed.average_bits for fixed in found.fixed.values()] == BITS
    for allocation, measured in found.static.items():
        assert measured.loss == pytest.approx(_reference_loss(plain_model(folder, allocation), blocks), rel=1e-5)
        assert measured.average_bits == pytest.approx(sum(allocation) / NUM_LAYERS)
    assert any(0 < shares.get(0, 0) < 1 for shares in found.router.shares)
    bits, tokens = 0, 0
    for row in blocks:
        output = gated.infer_forward(torch.tensor([row["input_ids"][: sum(row["attention_mask"])]]))
        bits += sum(int(chosen.sum()) for chosen in output.num_bits or ())
        tokens += sum(row["attention_mask"])
    assert found.router.average_bits == pytest.approx(bits / tokens / NUM_LAYERS)


def test_thresholds_are_restored_after_a_failure(
    gated: LayerwiseQuantizeForCausalLM, blocks: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C at the first call."""

    def interrupt(*_: object, **__: object) -> None:
        assert gated.hard_thresholds == [0.0] * NUM_LAYERS
        raise KeyboardInterrupt

    gated.set_hard_threshold(0.5)
    monkeypatch.setattr(gated, "infer_forward", interrupt)
    with pytest.raises(KeyboardInterrupt):
        evaluate_precisions(gated, blocks, blocks)
    assert gated.hard_thresholds == [0.5] * NUM_LAYERS


def test_fewer_bits_than_the_lowest_precision_compare_with_nothing(
    gated: LayerwiseQuantizeForCausalLM, blocks: Dataset, calibration: Dataset
) -> None:
    gated.set_hard_threshold(2.0)
    found = evaluate_precisions(gated, blocks, calibration)
    assert found.router.average_bits == 0
    assert found.at_router is None
    assert found.caveats == ["fewer bits than any static allocation"]
    assert min(measured.average_bits for measured in found.static.values()) == BITS[0]


def test_routers_are_trained_once_they_read_the_input(
    folder: Path, evaluation: PrecisionEvaluation, blocks: Dataset, calibration: Dataset
) -> None:
    untrained = evaluate_precisions(LayerwiseQuantizeForCausalLM.from_quantized(folder), blocks, calibration)
    assert (evaluation.trained, evaluation.caveats) == (True, [])
    assert (untrained.trained, untrained.caveats) == (False, ["choice of bits untrained"])


def test_counts(evaluation: PrecisionEvaluation) -> None:
    assert evaluation.sequences == 5
    assert evaluation.predicted_tokens == 4 * (SEQUENCE_LENGTH - 1) + 6


def test_a_precision_alone_is_all_there_is(folder: Path, blocks: Dataset, calibration: Dataset) -> None:
    model = LayerwiseQuantizeForCausalLM.from_quantized(folder, [4])
    found = evaluate_precisions(model, blocks, calibration)
    assert found.at_router == (4, 4, 4)
    assert found.static == {(4, 4, 4): found.fixed[4]}
    assert found.router == found.fixed[4]


def test_routers_decide_again_when_it_is_over(
    model: LayerwiseQuantizeForCausalLM, blocks: Dataset, calibration: Dataset
) -> None:
    prompt = torch.tensor([blocks[0]["input_ids"]])
    model.fix_precision(None)
    expected = model.infer_forward(prompt).logits
    model.train()
    evaluate_precisions(model, blocks.select([0]), calibration.select([0]))
    assert model.training
    model.eval()
    found = model.infer_forward(prompt).logits
    assert found is not None
    assert expected is not None
    assert torch.equal(found, expected)


@pytest.mark.parametrize("which", [0, 1])
def test_refuses_a_text_of_another_model(model: LayerwiseQuantizeForCausalLM, blocks: Dataset, which: int) -> None:
    texts = [blocks, blocks]
    texts[which] = Dataset.from_list([{"input_ids": [1, 300], "attention_mask": [1, 1], "labels": [1, 300]}])
    with pytest.raises(DataError, match="the token 300, but the model has 300"):
        evaluate_precisions(model, *texts)


def test_blocks_that_are_skipped_count_as_no_bits() -> None:
    measured = PrecisionMeasurement(1.0, ({0: 0.5, 4: 0.5}, {16: 1.0}))
    assert measured.average_bits_per_block == [2.0, 16.0]
    assert measured.average_bits == 9.0
