import numpy as np
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from modcompile.passes import lower_gates
from modcompile.passes.nested_graphs import all_graphs
from modcompile.passes.round_activations import round_activations, round_to_int8
from modcompile.quantization import QuantizedWeight, pack, quantize
from tests.passes.traced import BATCH, TOKENS, Run, random, traced
from tests.tiny_graphs import hard_graph, random_routers

_IN, _OUT, _GROUP = 96, 48, 64


def test_rounds_each_group_by_its_largest_value() -> None:
    x = torch.tensor([[127.0, 1.4, -1.6, 0.0, 0.0, 0.0, 0.5, -254.0, 3.1]])
    expected = [[127.0, 1.0, -2.0, 0.0, 0.0, 0.0, 0.0, -254.0, 3.1]]
    torch.testing.assert_close(round_to_int8(x, 4), torch.tensor(expected))


def _in_onnx_runtime(x: torch.Tensor, weight: QuantizedWeight) -> torch.Tensor:
    packed = pack(weight.codes, weight.num_bits).numpy()
    initializers = [
        helper.make_tensor("B", TensorProto.UINT8, packed.shape, packed.tobytes(), raw=True),
        helper.make_tensor(
            "scales", TensorProto.FLOAT, [weight.scales.numel()], weight.scales.numpy().tobytes(), raw=True
        ),
    ]
    attributes = {"K": _IN, "N": _OUT, "bits": weight.num_bits, "block_size": _GROUP, "accuracy_level": 4}
    node = helper.make_node("MatMulNBits", ["A", "B", "scales"], ["Y"], domain="com.microsoft")
    node.attribute.extend(helper.make_attribute(name, value) for name, value in attributes.items())
    sizes = {"A": _IN, "Y": _OUT}
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, size]) for name, size in sizes.items()]
    graph = helper.make_graph([node], "product", ends[:1], ends[1:], initializers)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"A": x.numpy()})
    assert isinstance(y, np.ndarray)
    return torch.from_numpy(y)


@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("num_bits", [2, 4, 8])
def test_is_what_onnx_runtime_computes(num_bits: int, rows: int) -> None:
    weight = quantize(random(_OUT, _IN), num_bits, _GROUP)
    x = random(rows, _IN, seed=1)
    actual = round_to_int8(x, _GROUP) @ weight.dequantize(_IN).T
    expected = _in_onnx_runtime(x, weight)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-4)
    # And not what it would be without rounding.
    assert not torch.allclose(x @ weight.dequantize(_IN).T, expected, rtol=1e-3, atol=1e-2)


def test_rounds_what_the_given_weights_multiply() -> None:
    first, second = inner = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8, bias=False))
    x = random(BATCH, TOKENS, 8)
    gm = traced(Run(lambda self, x: self.inner(x), inner=inner), x)
    rounded = round_activations(gm, {second.get_parameter("weight"): 4})
    with torch.no_grad():
        torch.testing.assert_close(rounded(x)[0], second(round_to_int8(first(x), 4)))
        assert torch.equal(gm(x)[0], inner(x))


def test_what_several_products_read_is_rounded_once() -> None:
    inner = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
    x = random(BATCH, TOKENS, 8)
    gm = traced(Run(lambda self, x: (self.inner[0](x), self.inner[1](x)), inner=inner), x)
    rounded = round_activations(gm, {linear.get_parameter("weight"): 4 for linear in inner})
    assert sum(node.target is round_to_int8 for node in rounded.graph.nodes) == 1
    with torch.no_grad():
        torch.testing.assert_close(list(rounded(x)), [linear(round_to_int8(x, 4)) for linear in inner])


def test_rounds_in_the_branches_of_a_lowered_graph() -> None:
    """Where both are on one weight, in both."""
    gm = lower_gates(hard_graph("llama", random_routers([1])))
    branches = [gm.get_submodule(f"blocks.1.{name}") for name in ("then_branch", "else_branch")]
    (key,) = {weight for name, weight in branches[1].named_parameters() if name.endswith("k_proj.weight")}
    rounded = round_activations(gm, {key: 16})
    graphs = [rounded.get_submodule(f"blocks.1.{name}") for name in ("then_branch", "else_branch")]
    found = [
        sum(node.target is round_to_int8 for inner in all_graphs(graph) for node in inner.graph.nodes)
        for graph in graphs
    ]
    assert found == [1, 1]
    untouched = rounded.get_submodule("blocks.0")
    assert not any(node.target is round_to_int8 for inner in all_graphs(untouched) for node in inner.graph.nodes)
