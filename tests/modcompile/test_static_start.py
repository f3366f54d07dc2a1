from pathlib import Path

import pytest
import torch
from datasets import Dataset

from modcompile.config import RouterConfig
from modcompile.layerwise import LayerwiseQuantizeForCausalLM
from modcompile.precision_sensitivity import measure_block_sensitivity
from modcompile.static_allocation import allocation_at, greedy_allocations
from modcompile.static_start import start_at_static
from tests.tiny_quantized import let_routers_decide


@pytest.fixture(scope="module")
def blocks() -> Dataset:
    ids = torch.randint(3, 300, (2, 12), generator=torch.Generator().manual_seed(0)).tolist()
    return Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * 12] * 2, "labels": ids})


def test_depth_gates_are_open_while_sensitivity_is_measured(quantized_folder: Path, blocks: Dataset) -> None:
    """The start is that of the same weights without gates, which decide again afterwards."""
    plain = LayerwiseQuantizeForCausalLM.from_quantized(quantized_folder)
    gated = LayerwiseQuantizeForCausalLM.from_quantized(quantized_folder, depth=RouterConfig(router_hidden_size=8))
    let_routers_decide(gated)
    gated.set_hard_threshold(2.0)  # skips all: sensitivity to bits would be 0 everywhere
    assert start_at_static(gated, blocks, 6.0) == start_at_static(plain, blocks, 6.0)
    assert gated.hard_thresholds == [2.0] * len(gated.depth_routers)


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
