from pathlib import Path

import pytest
import torch
from datasets import Dataset

from modcompile.layerwise import LayerwiseQuantizeForCausalLM
from modcompile.precision_sensitivity import measure_block_sensitivity
from modcompile.static_allocation import allocation_at, greedy_allocations
from modcompile.static_start import start_at_static
from tests.tiny_quantized import let_routers_decide


@pytest.fixture(scope="module")
def blocks() -> Dataset:
    ids = torch.randint(3, 300, (2, 12), generator=torch.Generator().manual_seed(0)).tolist()
    return Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * 12] * 2, "labels": ids})


@pytest.mark.parametrize("average", [1.0, 6.0, 16.0])
def test_routers_begin_with_the_best_static_allocation(quantized_folder: Path, blocks: Dataset, average: float) -> None:
    model = LayerwiseQuantizeForCausalLM.from_quantized(quantized_folder)
    let_routers_decide(model)
    chosen = start_at_static(model, blocks, average)
    allocations = greedy_allocations(measure_block_sensitivity(model, len(model.routers), blocks))
    assert chosen == (allocation_at(allocations, average) or (model.precisions[0],) * len(model.routers))
    model.fix_precision(None)
    for seed in range(3):
        ids = torch.randint(3, 300, (2, 7), generator=torch.Generator().manual_seed(seed))
        assert [int(bits.unique()) for bits in model.infer_forward(ids).num_bits or ()] == list(chosen)
