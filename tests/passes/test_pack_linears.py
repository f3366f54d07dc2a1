import pytest
import torch
from torch import fx, nn
from torch.nn import functional

from modcompile.export.export_config import WeightRounding
from modcompile.export.round_weights import round_weights
from modcompile.passes import fuse_operators
from modcompile.passes.add_unmasked_branch import add_unmasked_branch
from modcompile.passes.nested_graphs import all_graphs
from modcompile.passes.pack_linears import pack_linears
from modcompile.passes.quantize_weights import quantize_weights
from tests.model_inputs import make_inputs
from tests.passes.traced import BATCH, TOKENS, Run, calls, random, traced
from tests.wide_models import wide_lowered, wide_model, wide_outlined

X = random(BATCH, TOKENS, 8)


def _layers(**sizes: tuple[int, int]) -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({name: nn.Linear(*size, bias=name.endswith("b")) for name, size in sizes.items()})


def _count(gm: fx.GraphModule, name: str) -> int:
    return sum(calls(each)[name] for each in all_graphs(gm))


@pytest.mark.parametrize(
    ("layers", "left"),
    [
        pytest.param(_layers(one=(8, 6), two=(8, 4)), 1, id="without biases"),
        pytest.param(_layers(one_b=(8, 6), two_b=(8, 4)), 1, id="with biases"),
        pytest.param(_layers(one=(8, 6), two_b=(8, 4)), 2, id="one with a bias"),
        pytest.param(_layers(one=(8, 6), two=(8, 4), three=(8, 1)), 1, id="three"),
        pytest.param(_layers(one=(8, 6)), 1, id="one alone"),
    ],
)
@torch.no_grad()
def test_computes_products_of_one_tensor_as_one(layers: nn.ModuleDict, left: int) -> None:
    def sums(self: Run, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([layer(x).relu() for layer in layers.values()], -1)

    gm = traced(Run(sums, inner=layers), X)
    packed = pack_linears(gm)
    assert calls(packed)["linear"] == left
    torch.testing.assert_close(packed(X), gm(X), rtol=0, atol=1e-6)


@torch.no_grad()
def test_leaves_products_of_different_tensors() -> None:
    layers = _layers(one=(8, 6), two=(8, 4))
    gm = traced(Run(lambda self, x: (layers["one"](x), layers["two"](x.relu())), inner=layers), X)
    assert calls(pack_linears(gm))["linear"] == 2


@torch.no_grad()
def test_leaves_weights_that_are_computed() -> None:
    weight = random(8, 8, seed=1)
    gm = traced(
        Run(lambda self, x: (functional.linear(x, self.weight), functional.linear(x, self.weight.abs())), weight), X
    )
    assert calls(pack_linears(gm))["linear"] == 2


@pytest.mark.parametrize("quantized", [False, True])
@torch.no_grad()
def test_of_a_model(quantized: bool) -> None:
    gm, model = wide_outlined("llama"), wide_model("llama")
    if quantized:
        gm = quantize_weights(gm, round_weights(gm, rounding=WeightRounding(4, 16, symmetric=False)))
    fused = fuse_operators(gm)
    packed = pack_linears(fused)
    product, layers = "matmul_nbits" if quantized else "linear", model.config.num_hidden_layers
    assert _count(fused, product) - _count(packed, product) == 3 * layers  # queries, keys, values; gate and up
    inputs = make_inputs(model, 2, 5, 3, "left")
    torch.testing.assert_close(packed(*inputs.flat), fused(*inputs.flat), rtol=0, atol=1e-5)


def test_branches_that_multiply_by_the_same_share_what_is_packed() -> None:
    packed = pack_linears(fuse_operators(add_unmasked_branch(wide_lowered("llama", (range(1),)))))
    unmasked, masked = (
        dict(packed.get_submodule(f"blocks.0.{name}").named_buffers())
        for name in ("then_branch", "else_branch.then_branch.block")
    )
    names = [name for name in unmasked if name.startswith("packed")]
    assert len(names) == 2
    assert all(unmasked[name] is masked[name] for name in names)
