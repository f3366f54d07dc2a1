from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn

from modcompile.config import RouterConfig
from modcompile.modeling import RoutedForCausalLM
from modcompile.routed_graph import build_routed
from modcompile.skip_adapters import LowRankAdapter
from modcompile.whitening import WhitenedSteps, input_whitening
from tests.tiny_routed import tiny_base


def _model(**options: Any) -> RoutedForCausalLM:
    defaults: dict[str, Any] = {"skip_adapter": "low_rank", "adapter_rank": 3, "router_start": 1}
    return build_routed(tiny_base(), RouterConfig(**(defaults | options)), use_cache=False)


def _root(model: RoutedForCausalLM, roots: dict[nn.Parameter, torch.Tensor], layer: int) -> torch.Tensor:
    adapter = model.adapters[layer]
    assert isinstance(adapter, LowRankAdapter)
    return roots[adapter.down.get_parameter("weight")]


@pytest.mark.parametrize("options", [{}, {"blocks_per_gate": 2}], ids=str)
def test_what_adapters_read_is_white(padded_rows: Dataset, options: dict[str, Any]) -> None:
    """But for the ridge: a direction of second moment c has c / (c + 0.1) in these coordinates."""
    model = _model(**options)
    roots = input_whitening(model, padded_rows, batch_size=3)
    assert len(roots) == len(model.adapters)
    batch = padded_rows.with_format("torch")[:]
    with torch.no_grad():
        output = model.base(batch["input_ids"], batch["attention_mask"], output_hidden_states=True, use_cache=False)
    for layer in model.adapters:
        read = output.hidden_states[layer][batch["attention_mask"] == 1].double()
        read = read / read.square().mean(-1, keepdim=True).sqrt()
        moment = read.T @ read / len(read)
        root = _root(model, roots, layer).double()
        white = torch.linalg.eigvalsh(root @ moment @ root)
        sizes = torch.linalg.eigvalsh(moment)
        torch.testing.assert_close(white, sizes / (sizes + 0.1), rtol=0, atol=1e-5)
        torch.testing.assert_close(root, root.T, rtol=0, atol=1e-6)


def test_neither_batches_nor_padding_matter(padded_rows: Dataset) -> None:
    cut = [
        {name: row[name][: sum(row["attention_mask"])] for name in ("input_ids", "attention_mask", "labels")}
        for row in padded_rows
    ]
    model = _model()
    first, *others = [
        _root(model, input_whitening(model, rows, batch_size=size), 2)
        for rows, size in ((padded_rows, 1), (padded_rows, 5), (Dataset.from_list(cut), 1))
    ]
    for other in others:
        torch.testing.assert_close(other, first, rtol=0, atol=1e-4)


def test_halves_of_layers_read_different_things(padded_rows: Dataset) -> None:
    model = _model(granularity="attn+mlp", router_start=0)
    roots = input_whitening(model, padded_rows)
    assert len(roots) == len(model.adapters)
    assert not torch.allclose(_root(model, roots, 2), _root(model, roots, 3), atol=1e-3)


@pytest.mark.parametrize("kind", ["none", "scale"])
def test_other_adapters_learn_as_they_are(padded_rows: Dataset, kind: str) -> None:
    assert input_whitening(_model(skip_adapter=kind), padded_rows) == {}


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        (torch.optim.AdamW, {"lr": 0.03, "weight_decay": 0.2}),
        (torch.optim.AdamW, {"lr": 0.03, "weight_decay": 0.0, "amsgrad": True}),
        (torch.optim.SGD, {"lr": 0.03, "momentum": 0.9}),
    ],
    ids=str,
)
def test_steps_are_those_of_the_matrix_in_other_coordinates(optimizer: Any, options: dict[str, Any]) -> None:
    """That matrix, trained itself, is the reference; a parameter beside it takes the steps that it always took."""
    generator = torch.Generator().manual_seed(0)
    x, y, start = (torch.randn(*shape, generator=generator) for shape in ((50, 6), (50, 2), (2, 6)))
    root = torch.randn(6, 6, generator=generator)
    root = root @ root.T / 6 + 0.1 * torch.eye(6)
    matrix, bias = nn.Parameter(start.clone()), nn.Parameter(torch.ones(2))
    inner, other = nn.Parameter(start @ torch.linalg.inv(root)), nn.Parameter(torch.ones(2))
    ours, reference = optimizer([matrix, bias], **options), optimizer([inner, other], **options)
    WhitenedSteps(ours, {matrix: root})
    for _ in range(20):
        ours.zero_grad()
        reference.zero_grad()
        (x @ matrix.T + bias - y).square().mean().backward()
        (x @ (inner @ root).T + other - y).square().mean().backward()
        ours.step()
        reference.step()
        torch.testing.assert_close(matrix.detach(), inner.detach() @ root, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(bias, other, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(matrix.detach(), start, atol=0.1)


def test_a_matrix_without_a_gradient_stays() -> None:
    matrix, moved = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(2, 3))
    optimizer = torch.optim.AdamW([matrix, moved], lr=0.1, weight_decay=0.5)
    WhitenedSteps(optimizer, {matrix: 2 * torch.eye(3), moved: 2 * torch.eye(3)})
    moved.sum().backward()
    optimizer.step()
    assert torch.equal(matrix, torch.ones(2, 3))
    # Decayed by 0.05, then a step of 0.1 in coordinates in which everything is half as large.
    torch.testing.assert_close(moved.detach(), torch.full((2, 3), 0.95 - 0.2))
