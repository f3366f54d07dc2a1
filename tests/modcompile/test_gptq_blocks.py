import copy
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import fx
from transformers import PreTrainedModel

from modcompile.block_inputs import BlockInputs
from modcompile.errors import CheckpointError
from modcompile.gptq import factor_inverse, quantize_gptq
from modcompile.gptq_blocks import quantize_blocks
from modcompile.passes.find_linears import find_linears
from modcompile.passes.outlined_form import block_calls
from modcompile.precision_config import QuantizationConfig
from modcompile.quantization import quantize
from modcompile.routed_graph import trace_outlined
from tests.tiny_graphs import shared_model
from tests.tiny_models import ARCHITECTURES, rotated_model
from tests.wide_models import wide_model

_UP = "model.layers.1.mlp.up_proj.weight"


def test_a_block_is_rounded_for_what_the_ones_before_it_compute_at_the_lowest_precision(
    llama: PreTrainedModel, random_text: Dataset
) -> None:
    weights = quantize_blocks(llama, QuantizationConfig(precisions=[2, 4], group_size=32), random_text)
    rounded = copy.deepcopy(llama)
    with torch.no_grad():
        for name, weight in weights.items():
            if ".layers.0." in name:
                rounded.get_parameter(name).copy_(weight.dequantize(2))
    gm = trace_outlined(rounded, use_cache=False)
    inputs = BlockInputs(gm, random_text)
    first, second, _ = block_calls(gm.graph)
    blocks = [gm.get_submodule(str(call.target)) for call in (first, second)]
    assert isinstance(blocks[0], fx.GraphModule) and isinstance(blocks[1], fx.GraphModule)
    inputs.advance(first, blocks[0])
    uses = {str(use.weight.target): use for use in find_linears(blocks[1].graph)}
    use = uses["mlp.up_proj.weight"]
    factor = factor_inverse(inputs.hessians(second, blocks[1], list(uses.values()))[use])
    alone = quantize_gptq(llama.get_parameter(_UP).detach(), factor, 2, 32)
    assert float((weights[_UP].dequantize(2) == alone.dequantize(32)).float().mean()) > 0.99


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "gemma3"])
def test_the_head_is_rounded_for_what_the_rounded_blocks_compute(architecture: str, random_text: Dataset) -> None:
    """On demand, and the blocks are rounded as without it."""
    # The weight of Gemma's last norm is made before the blocks.
    model = wide_model(architecture) if architecture == "gemma3" else shared_model(architecture)
    config = QuantizationConfig(precisions=[4], group_size=32)
    blocks = quantize_blocks(model, config, random_text)
    weights = quantize_blocks(model, config, random_text, with_head=True)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    (head,) = weights.keys() - blocks.keys()
    assert head == names[id(model.get_output_embeddings().weight)]
    for name, weight in blocks.items():
        assert torch.equal(weights[name].dequantize(4), weight.dequantize(4))
    rounded = copy.deepcopy(model)
    seen: list[torch.Tensor] = []
    rounded.get_output_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0][0].detach()))
    with torch.no_grad():
        for name, weight in blocks.items():
            parameter, dense = rounded.get_parameter(name), weight.dequantize(4)
            parameter.copy_(dense.T if _is_transposed(name) else dense)
        for row in random_text:
            rounded(input_ids=torch.tensor([row["input_ids"][: sum(row["attention_mask"])]]))
    inputs = torch.cat(seen)
    original = model.get_output_embeddings().weight.detach()
    nearest = quantize(original, 4, 32, symmetric=True).dequantize(original.shape[1])

    def lost(dense: torch.Tensor) -> float:
        return float((inputs @ (dense - original).T).norm())

    assert lost(weights[head].dequantize(4)) < 0.9 * lost(nearest)


def _is_transposed(name: str) -> bool:
    """Whether it is one of GPT-2's, which are `[in, out]`."""
    return name.startswith("transformer.h.")


@pytest.mark.parametrize("bits", [2, 4])
def test_the_child_is_what_its_bits_alone_would_be(llama: PreTrainedModel, random_text: Dataset, bits: int) -> None:
    nested, alone = (
        quantize_blocks(llama, QuantizationConfig(precisions=precisions, group_size=32), random_text)
        for precisions in ([bits, 8], [bits])
    )
    for name, weight in nested.items():
        assert torch.equal(weight.dequantize(bits), alone[name].dequantize(bits))


def test_products_with_a_fixed_buffer_are_left_alone(llama: PreTrainedModel, random_text: Dataset) -> None:
    config = QuantizationConfig(precisions=[4], group_size=32)
    found, expected = (quantize_blocks(base, config, random_text) for base in (rotated_model(), llama))
    assert found.keys() == {name.replace(".down_proj.", ".down_proj.linear.") for name in expected}
    for name, weight in found.items():
        plain = expected[name.replace(".down_proj.linear.", ".down_proj.")]
        assert torch.equal(weight.dequantize(4), plain.dequantize(4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_computes_in_float32(llama: PreTrainedModel, random_text: Dataset, dtype: torch.dtype) -> None:
    model: Any = copy.deepcopy(llama)
    model.to(dtype)
    config = QuantizationConfig(precisions=[4], group_size=32)
    found, expected = (quantize_blocks(base, config, random_text) for base in (model, copy.deepcopy(model).float()))
    assert model.dtype == dtype
    for name, weight in found.items():
        assert torch.equal(weight.dequantize(4), expected[name].dequantize(4))


def test_names_the_weight_whose_inputs_are_no_numbers(llama: PreTrainedModel, random_text: Dataset) -> None:
    model = copy.deepcopy(llama)
    with torch.no_grad():
        model.get_parameter("model.layers.1.post_attention_layernorm.weight").fill_(1e38)
    with pytest.raises(CheckpointError, match=r"the inputs of model\.layers\.1\..*NaN or infinity.* round to nearest"):
        quantize_blocks(model, QuantizationConfig(), random_text)
