from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from modcompile.config import RouterConfig
from modcompile.corpus import builtin_documents
from modcompile.layerwise import LayerwiseQuantizeForCausalLM
from modcompile.packing import tokenize_and_pack
from modcompile.precision_sensitivity import measure_block_sensitivity
from tests.tiny_quantized import NUM_LAYERS, let_routers_decide, plain_model, write_tiny_quantized


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_quantized(tmp_path_factory.mktemp("quantized") / "tiny", None)


@pytest.fixture(scope="module")
def blocks(tokenizer: PreTrainedTokenizerFast) -> Dataset:
    """Sequences of 16, 16 and 5 tokens."""
    tokens = tokenizer(builtin_documents("validation")[0], verbose=False)["input_ids"][:37]
    return tokenize_and_pack([str(tokenizer.decode(tokens))], tokenizer, 16)


@torch.no_grad()
def _chances(folder: Path, bits: list[int], blocks: Dataset) -> torch.Tensor:
    """What plain transformers predict after every token of the text, `[tokens, V]`."""
    model = plain_model(folder, bits)
    sequences = [torch.tensor([row["input_ids"][: sum(row["attention_mask"])]]) for row in blocks]
    return torch.cat([model(input_ids=input_ids).logits[0].double().softmax(-1) for input_ids in sequences])


def test_is_the_divergence_from_the_highest_precision(folder: Path, blocks: Dataset) -> None:
    sensitivity = measure_block_sensitivity(LayerwiseQuantizeForCausalLM.from_quantized(folder), NUM_LAYERS, blocks)
    expected = _chances(folder, [16, 16, 16], blocks)
    assert len(expected) == 37
    assert len(sensitivity) == NUM_LAYERS
    for layer, by_bits in enumerate(sensitivity):
        assert list(by_bits) == [16, 4, 2]
        assert by_bits[16] == 0
        for bits in (4, 2):
            found = _chances(folder, [bits if index == layer else 16 for index in range(NUM_LAYERS)], blocks)
            divergence = (expected * (expected.log() - found.log())).sum(-1).mean()
            assert by_bits[bits] == pytest.approx(float(divergence), rel=1e-4)
            assert by_bits[bits] > 0.001


def test_depth_gates_are_open(folder: Path, blocks: Dataset) -> None:
    gated = LayerwiseQuantizeForCausalLM.from_quantized(folder, depth=RouterConfig(router_hidden_size=8))
    let_routers_decide(gated)
    plain = measure_block_sensitivity(LayerwiseQuantizeForCausalLM.from_quantized(folder), NUM_LAYERS, blocks)
    for found, expected in zip(measure_block_sensitivity(gated, NUM_LAYERS, blocks), plain, strict=True):
        assert found == pytest.approx(expected, rel=1e-4)
    assert gated.hard_thresholds == [0.5] * NUM_LAYERS


def test_one_precision_diverges_from_nothing(folder: Path, blocks: Dataset) -> None:
    model = LayerwiseQuantizeForCausalLM.from_quantized(folder, [4])
    assert measure_block_sensitivity(model, NUM_LAYERS, blocks) == [{4: 0.0}] * NUM_LAYERS
