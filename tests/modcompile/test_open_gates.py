from pathlib import Path

import pytest
import torch

from modcompile.config import RouterConfig
from modcompile.layerwise import LayerwiseQuantizeForCausalLM
from modcompile.open_gates import open_gates
from tests.tiny_quantized import NUM_LAYERS, let_routers_decide

_IDS = torch.tensor([[5, 6, 7, 8]])


@pytest.fixture(scope="module")
def gated(quantized_folder: Path) -> LayerwiseQuantizeForCausalLM:
    model = LayerwiseQuantizeForCausalLM.from_quantized(quantized_folder, [4], depth=RouterConfig(router_hidden_size=8))
    let_routers_decide(model)
    return model


def _bits(model: LayerwiseQuantizeForCausalLM) -> set[int]:
    return set(torch.cat(model.infer_forward(_IDS).num_bits or ()).flatten().tolist())


def test_all_blocks_are_executed_while_it_lasts(gated: LayerwiseQuantizeForCausalLM) -> None:
    gated.set_hard_threshold([2.0, 0.0, 1.5])
    assert _bits(gated) == {0, 4}
    with open_gates(gated):
        assert _bits(gated) == {4}
    assert gated.hard_thresholds == [2.0, 0.0, 1.5]
    assert _bits(gated) == {0, 4}


def test_gates_decide_again_after_an_error(gated: LayerwiseQuantizeForCausalLM) -> None:
    gated.set_hard_threshold(0.25)
    with pytest.raises(ZeroDivisionError), open_gates(gated):
        _ = 1 // 0
    assert gated.hard_thresholds == [0.25] * NUM_LAYERS


def test_a_model_without_gates_is_left_alone(quantized_folder: Path) -> None:
    model = LayerwiseQuantizeForCausalLM.from_quantized(quantized_folder, [4])
    assert model.hard_thresholds == []
    with open_gates(model):
        assert _bits(model) == {4}
