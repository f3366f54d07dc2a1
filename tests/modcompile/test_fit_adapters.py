import copy

import pytest
import torch
from datasets import Dataset
from torch import nn

from modcompile.config import RouterConfig
from modcompile.fit_adapters import AdapterSums, fit_adapters
from modcompile.modeling import RoutedForCausalLM
from modcompile.routed_graph import build_routed
from modcompile.skip_adapters import LowRankAdapter, ScaleAdapter
from modcompile.tracing import find_layers
from tests.tiny_models import HIDDEN_SIZE
from tests.tiny_routed import tiny_base


def _model(rank: int, *, blocks_per_gate: int = 1) -> RoutedForCausalLM:
    config = RouterConfig(
        router_hidden_size=0,
        skip_adapter="low_rank",
        adapter_rank=rank,
        router_start=1,
        blocks_per_gate=blocks_per_gate,
    )
    return build_routed(tiny_base(), config, use_cache=False)


@torch.no_grad()
def _seen(model: RoutedForCausalLM, padded_rows: Dataset, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states of the tokens before and after a layer, `[N, H]`, each divided by its size before."""
    batch = padded_rows.with_format("torch")[:]
    output = model.base(batch["input_ids"], batch["attention_mask"], output_hidden_states=True, use_cache=False)
    # What the last layer returns is only given normed: here it is not asked for.
    before, after = (output.hidden_states[index][batch["attention_mask"] == 1] for index in (layer, layer + 1))
    size = before.square().mean(-1, keepdim=True).sqrt()
    return before / size, after / size


def _error(adapter: nn.Module, before: torch.Tensor, after: torch.Tensor) -> float:
    with torch.no_grad():
        return float((after - adapter(before)).square().sum())


@pytest.mark.parametrize("rank", [1, 4, HIDDEN_SIZE])
def test_no_linear_map_of_its_rank_is_nearer(padded_rows: Dataset, rank: int) -> None:
    """Than by 1 % for the ridge; each is improved on by gradient descent from where it is, in vain."""
    model = _model(rank)
    fit_adapters(model, padded_rows, batch_size=3)
    before, after = _seen(model, padded_rows, 1)
    adapter = model.adapters[1]
    assert isinstance(adapter, LowRankAdapter)
    fitted = _error(adapter, before, after)
    assert fitted < 0.95 * _error(nn.Identity(), before, after)
    optimizer = torch.optim.LBFGS(adapter.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> float:
        optimizer.zero_grad()
        loss = (after - adapter(before)).square().sum()
        loss.backward()
        return float(loss.detach())

    optimizer.step(closure)
    assert _error(adapter, before, after) > 0.99 * fitted


def test_more_rank_is_nearer(padded_rows: Dataset) -> None:
    errors = []
    for rank in (1, 2, 8, HIDDEN_SIZE):
        model = _model(rank)
        fit_adapters(model, padded_rows)
        errors.append(_error(model.adapters[1], *_seen(model, padded_rows, 1)))
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("rank", [1, 4, HIDDEN_SIZE])
def test_factors_are_alike(rank: int) -> None:
    """However hidden states and gradients are scaled: each direction is as long in the one factor as in the other."""
    before = torch.randn(200, HIDDEN_SIZE, generator=torch.Generator().manual_seed(0))
    after = before + before @ torch.randn(HIDDEN_SIZE, HIDDEN_SIZE, generator=torch.Generator().manual_seed(1))
    for scale in (1e-6, 1.0, 1e6):
        sums, adapter = AdapterSums(HIDDEN_SIZE, torch.device("cpu")), LowRankAdapter(HIDDEN_SIZE, rank)
        sums.add(before, after)
        sums.fit(adapter, scale * torch.diag(torch.linspace(0.1, 1, HIDDEN_SIZE)))
        up, down = adapter.up.weight.detach(), adapter.down.weight.detach()
        lengths = up.square().sum(0)
        assert lengths.min() > 0
        torch.testing.assert_close(up.T @ up, lengths.diag(), rtol=0, atol=1e-4 * float(lengths.max()))
        torch.testing.assert_close(down @ down.T, lengths.diag(), rtol=0, atol=1e-4 * float(lengths.max()))


def test_neither_batches_nor_padding_matter(padded_rows: Dataset) -> None:
    weights = []
    cut = [
        {name: row[name][: sum(row["attention_mask"])] for name in ("input_ids", "attention_mask", "labels")}
        for row in padded_rows
    ]
    for rows, batch_size in ((padded_rows, 1), (padded_rows, 5), (Dataset.from_list(cut), 1)):
        model = _model(4)
        fit_adapters(model, rows, batch_size=batch_size)
        adapter = model.adapters[2]
        assert isinstance(adapter, LowRankAdapter)
        weights.append((adapter.up.weight @ adapter.down.weight).detach())
    for other in weights[1:]:
        torch.testing.assert_close(other, weights[0], rtol=0, atol=1e-4)


def test_fits_the_members_of_a_group_each_by_itself(padded_rows: Dataset) -> None:
    alone, grouped = _model(4), _model(4, blocks_per_gate=2)
    for model in (alone, grouped):
        fit_adapters(model, padded_rows)
    for layer in (1, 2):
        torch.testing.assert_close(
            grouped.adapters[layer].state_dict(), alone.adapters[layer].state_dict(), rtol=0, atol=1e-5
        )


def test_what_is_fitted_or_trained_stays(padded_rows: Dataset) -> None:
    model = _model(4)
    fit_adapters(model, padded_rows)
    fitted = {layer: copy.deepcopy(adapter.state_dict()) for layer, adapter in model.adapters.items()}
    fit_adapters(model, padded_rows.select([3]))
    for layer, adapter in model.adapters.items():
        torch.testing.assert_close(adapter.state_dict(), fitted[layer], rtol=0, atol=0)


def test_leaves_everything_else_alone(padded_rows: Dataset) -> None:
    model = build_routed(tiny_base(), RouterConfig(router_hidden_size=0, skip_adapter="scale"), use_cache=False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fit_adapters(model, padded_rows)
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    assert all(isinstance(adapter, ScaleAdapter) for adapter in model.adapters.values())
    fitted = _model(4)
    fit_adapters(fitted, padded_rows)
    assert not any(layer._forward_hooks for layer in find_layers(fitted.base))
    torch.testing.assert_close(dict(fitted.base.state_dict()), dict(tiny_base().state_dict()), rtol=0, atol=0)
