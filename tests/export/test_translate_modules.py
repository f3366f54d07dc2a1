from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn

from modcompile.export.translate_modules import OPSET, Example, Translation, specimen, translate_modules
from modcompile.passes.extract_subgraph import get_attribute
from tests.export.onnx_text import run

TOKENS: Example = (torch.arange(6).view(2, 3), torch.arange(15).view(3, 5))
HIDDEN: Example = (torch.randn(2, 3, 8), torch.randn(3, 5, 8))


class Embed(nn.Module):
    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return nn.functional.embedding(ids, self.weight), ids


class Head(nn.Module):
    """Reads one tensor under two names, and another not at all."""

    offset: torch.Tensor

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight, self.twin, self.unused = weight, weight, nn.Parameter(torch.ones(3))
        self.register_buffer("offset", torch.full((1,), 2.0), persistent=False)

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor]:
        return (hidden @ self.weight.T + hidden @ self.twin.T + self.offset,)


WEIGHT = nn.Parameter(torch.randn(16, 8, generator=torch.Generator().manual_seed(0)))
MODULES: tuple[nn.Module, ...] = (Embed(WEIGHT), Head(WEIGHT), Head(nn.Parameter(WEIGHT.detach() + 1)))


@pytest.fixture(scope="module")
def translations() -> list[Translation]:
    examples = ([TOKENS], [HIDDEN], [HIDDEN])
    names = ("embed", "head", "other_head")
    return translate_modules([specimen(*parts) for parts in zip(names, MODULES, examples, strict=True)])


def evaluate(translation: Translation, module: nn.Module, inputs: Sequence[torch.Tensor]) -> list[np.ndarray]:
    """Run the translation on the parameters of a module."""
    tensors = [*inputs, *(get_attribute(module, name).detach() for name in translation.state)]
    graph = translation.graph.clone()
    graph.opset_imports.setdefault("", OPSET)
    values = zip(graph.inputs, tensors, strict=True)
    return list(run(ir.Model(graph, ir_version=10), {str(v.name): tensor.numpy() for v, tensor in values}).values())


@pytest.mark.parametrize("sizes", [(2, 3), (1, 1), (4, 9)])
@torch.no_grad()
def test_each_computes_what_its_module_computes(translations: list[Translation], sizes: tuple[int, int]) -> None:
    inputs = (torch.randint(16, sizes), torch.randn(*sizes, 8), torch.randn(*sizes, 8))
    for translation, module, tensor in zip(translations, MODULES, inputs, strict=True):
        for actual, expected in zip(evaluate(translation, module, [tensor]), module(tensor), strict=True):
            np.testing.assert_allclose(actual, expected.numpy(), rtol=0, atol=1e-5)


def test_a_tensor_that_modules_or_names_share_is_an_input_of_its_own_in_each(translations: list[Translation]) -> None:
    assert [set(translation.state) for translation in translations] == [
        {"weight"},
        {"weight", "twin", "offset"},
        {"weight", "twin", "offset"},
    ]


def test_a_graph_has_inputs_for_its_weights_and_dimensions_of_its_own(translations: list[Translation]) -> None:
    for translation in translations:
        first, *state = translation.graph.inputs
        assert [value.name for value in state] == [f"state.{name}" for name in translation.state]
        assert all(value.shape is not None and value.shape.is_static() for value in state)
        assert first.shape is not None
        assert [isinstance(dim, int) for dim in first.shape] == [False, False, True][: len(first.shape)]


def test_a_specimen_tells_what_it_returns_at_both_sizes() -> None:
    outputs = specimen("embed", MODULES[0], [TOKENS]).outputs
    assert [(first.shape, second.shape) for first, second in outputs] == [((2, 3, 8), (3, 5, 8)), ((2, 3), (3, 5))]
