import pytest
import torch
from torch import fx, nn
from transformers import PreTrainedModel

from modcompile.passes import harden_gates, insert_depth_gates, lower_gates
from modcompile.passes.nested_graphs import all_graphs
from modcompile.passes.outlined_form import block_calls
from modcompile.passes.quantize_weights import find_weights, quantize_weights
from modcompile.precisions import PackedWeight
from modcompile.quantization import quantize
from modcompile.quantizing import find_block_linears
from modcompile.routed_graph import trace_outlined
from modcompile.routers import SoftGate
from tests.model_inputs import make_inputs, run_model
from tests.passes.traced import BATCH, TOKENS, Run, calls, random, traced
from tests.tiny_graphs import hard_graph, random_routers
from tests.tiny_models import rotated_model, tiny_model

_PRODUCTS = {"linear", "addmm", "mm", "matmul"}


def _codes(weights: dict[nn.Parameter, bool], num_bits: int, *, symmetric: bool) -> dict[nn.Parameter, PackedWeight]:
    quantized = {}
    for weight, is_transposed in weights.items():
        stored = weight.detach().T if is_transposed else weight.detach()
        quantized[weight] = PackedWeight.of(quantize(stored, num_bits, 16, symmetric=symmetric))
    return quantized


@pytest.mark.parametrize(("num_bits", "symmetric"), [(4, False), (4, True), (8, False), (8, True)])
@torch.no_grad()
def test_computes_what_the_dequantized_weights_do(architecture: str, num_bits: int, symmetric: bool) -> None:
    """In both branches of each layer; where all layers are executed, transformers computes it, too."""
    model = tiny_model(architecture)  # its own: its weights are rounded
    gm = lower_gates(harden_gates(insert_depth_gates(trace_outlined(model), random_routers(range(3)), SoftGate())))
    weights = find_weights(gm)
    codes = _codes(weights, num_bits, symmetric=symmetric)
    quantized = quantize_weights(gm, codes)
    for weight, is_transposed in weights.items():
        stored = weight.T if is_transposed else weight
        stored.copy_(codes[weight].dequantize(stored.shape[1]))
    inputs = make_inputs(model, 2, 5, 4, "left")
    for thresholds in ([2.0, 0.0, 2.0], [0.0, 2.0, 0.0], [0.5, 0.5, 0.5], [0.0, 0.0, 0.0]):
        gm.get_buffer("routing_threshold").copy_(torch.tensor(thresholds))
        results = [inputs.at_tokens(graph(*inputs.flat)) for graph in (quantized, gm)]
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    dense = inputs.at_tokens(run_model(model, inputs))
    torch.testing.assert_close(results[0][: len(dense)], dense, rtol=1e-4, atol=1e-4)


def test_finds_the_weights_of_blocks_the_head_and_the_embedding_of_tokens(
    outlined: fx.GraphModule, model: PreTrainedModel
) -> None:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {names[id(weight)]: is_transposed for weight, is_transposed in find_weights(outlined).items()}
    ends = {names[id(module.weight)] for module in (model.get_input_embeddings(), model.get_output_embeddings())}
    assert found == find_block_linears(model) | dict.fromkeys(ends, False)


def test_leaves_no_other_product_and_no_original_weight(outlined: fx.GraphModule, model: PreTrainedModel) -> None:
    weights = find_weights(outlined)
    quantized = quantize_weights(outlined, _codes(weights, 4, symmetric=False))
    assert not any(_PRODUCTS & calls(gm).keys() for gm in all_graphs(quantized))
    for name, operator in (("prologue", "gather_block_quantized"), ("epilogue", "matmul_nbits")):
        end = quantized.get_submodule(name)
        assert isinstance(end, fx.GraphModule)
        assert calls(end)[operator] == 1
    kept = {id(parameter) for parameter in quantized.parameters()}
    assert kept == {id(parameter) for parameter in model.parameters()} - {id(weight) for weight in weights}


@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_codes_of_one_parameter_are_one_tensor(architecture: str) -> None:
    """In both branches of a block, and as embedding and head where these are tied."""
    gm = lower_gates(hard_graph(architecture, random_routers([0])))
    codes = _codes(find_weights(gm), 4, symmetric=False)
    quantized = quantize_weights(gm, codes)
    tensors: dict[int, list[str]] = {}
    for name, tensor in quantized.named_buffers(remove_duplicate=False):
        if name.endswith(("_packed", "_zero_points")):
            tensors.setdefault(id(tensor), []).append(name)
    assert len(tensors) == 2 * len(codes)
    shared = [names for names in tensors.values() if len(names) > 1]
    branches = [names for names in shared if all(name.startswith("blocks.0.") for name in names)]
    assert len(branches) == 2 * 2  # keys and values
    assert len(shared) - len(branches) == (2 if architecture == "opt" else 0)


def test_leaves_what_is_no_parameter() -> None:
    gm = trace_outlined(rotated_model())
    quantized = quantize_weights(gm, _codes(find_weights(gm), 8, symmetric=True))
    for call in block_calls(quantized.graph):
        block = quantized.get_submodule(str(call.target))
        assert isinstance(block, fx.GraphModule)
        assert calls(block)["matmul"] == 1


def test_leaves_a_weight_that_is_used_both_ways_round() -> None:
    weight = random(8, 8)
    gm = traced(
        Run(lambda self, x: torch.nn.functional.linear(x, self.weight) + x @ self.weight, weight),
        random(BATCH, TOKENS, 8),
    )
    assert find_weights(gm) == {}


@torch.no_grad()
def test_one_product_may_be_the_input_of_another() -> None:
    inner = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    x = random(BATCH, TOKENS, 16)
    gm = traced(Run(lambda self, x: self.inner(x), inner=inner), x)
    codes = _codes(find_weights(gm), 4, symmetric=True)
    quantized = quantize_weights(gm, codes)
    assert calls(quantized) == {"matmul_nbits": 2, "add": 2}
    for weight, packed in codes.items():
        weight.copy_(packed.dequantize(16))
    torch.testing.assert_close(quantized(x)[0], inner(x))
