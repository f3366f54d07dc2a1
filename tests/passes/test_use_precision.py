from typing import Any

import pytest
import torch
from torch import fx, nn
from transformers import PreTrainedModel

from modcompile.passes.outlined_form import block_calls, called_modules, copy_graph
from modcompile.passes.replace_weights import replace_weights
from modcompile.passes.use_precision import use_precision
from modcompile.precision_config import QuantizationConfig
from modcompile.precisions import MultiPrecisionWeight, quantize_weight
from modcompile.quantizing import find_block_linears
from tests.model_inputs import make_inputs
from tests.passes.traced import BATCH, TOKENS, Run, calls, random, traced


def _weights(
    block: fx.GraphModule, *, is_transposed: bool, config: QuantizationConfig
) -> dict[str, MultiPrecisionWeight]:
    found = {}
    for name, parameter in block.named_parameters():
        if parameter.dim() == 2:
            found[name] = quantize_weight(parameter.detach().T if is_transposed else parameter.detach(), config)
    return found


@pytest.mark.parametrize("precision", [2, 4, 8])
@pytest.mark.parametrize("options", [{}, {"symmetric": False}, {"weight_sharing": "separate"}], ids=str)
@torch.no_grad()
def test_computes_what_the_dequantized_weights_do(
    outlined: fx.GraphModule, model: PreTrainedModel, precision: int, options: dict[str, Any]
) -> None:
    config = QuantizationConfig(precisions=[2, 4, 8], group_size=32, **options)
    is_transposed = any(find_block_linears(model).values())
    graph, outputs = copy_graph(outlined)
    graph.output(outputs)
    versions: list[dict[str, Any]] = [dict(called_modules(outlined)) for _ in range(2)]
    for call in block_calls(outlined.graph):
        block = outlined.get_submodule(str(call.target))
        assert isinstance(block, fx.GraphModule)
        weights = _weights(block, is_transposed=is_transposed, config=config)
        quantized = use_precision(block, weights, precision)
        dense = {name: weight.dequantize(precision) for name, weight in weights.items()}
        turned = {name: tensor.T if is_transposed else tensor for name, tensor in dense.items()}
        versions[0][str(call.target)] = quantized
        versions[1][str(call.target)] = replace_weights(block, turned, "dense")
        assert not any(name in weights for name, _ in quantized.named_parameters())
        nested = options.get("weight_sharing") != "separate"
        parts = {2: 1, 4: 2, 8: 3}[precision] if nested else 1
        assert calls(quantized)["matmul_nbits"] == parts * len(weights)
        assert not {"linear", "addmm"} & calls(quantized).keys()
    inputs = make_inputs(model, 3, 5, 4, "left", 0)
    actual, expected = (fx.GraphModule(modules, graph)(*inputs.flat) for modules in versions)
    torch.testing.assert_close(inputs.at_tokens(actual), inputs.at_tokens(expected), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_one_product_may_be_the_input_of_another() -> None:
    inner = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    x = random(BATCH, TOKENS, 32)
    gm = traced(Run(lambda self, x: self.inner(x), inner=inner), x)
    weights = _weights(gm, is_transposed=False, config=QuantizationConfig(precisions=[4], group_size=32))
    quantized = use_precision(gm, weights, 4)
    assert calls(quantized) == {"matmul_nbits": 2, "add": 2}
    for (_, linear), weight in zip(inner.named_children(), weights.values(), strict=True):
        linear.get_parameter("weight").copy_(weight.dequantize(4))
    torch.testing.assert_close(quantized(x)[0], inner(x))
