import pytest
import torch
from torch import nn

from modcompile.config import SkipAdapterKind
from modcompile.skip_adapters import LowRankAdapter, ScaleAdapter, make_adapter

HIDDEN = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("kind", "cls", "count"), [("scale", ScaleAdapter, 2 * 8), ("low_rank", LowRankAdapter, 2 * 8 * 3)]
)
@torch.no_grad()
def test_starts_as_the_identity_with_few_parameters(kind: SkipAdapterKind, cls: type[nn.Module], count: int) -> None:
    adapter = make_adapter(kind, 8, 3)
    assert type(adapter) is cls
    assert torch.equal(adapter(HIDDEN), HIDDEN)
    assert sum(parameter.numel() for parameter in adapter.parameters()) == count


def test_none_is_no_module() -> None:
    assert make_adapter("none", 8, 3) is None


@torch.no_grad()
def test_scales_and_shifts_every_feature() -> None:
    adapter = ScaleAdapter(8)
    adapter.scale.copy_(torch.arange(8))
    adapter.shift.fill_(0.5)
    assert torch.equal(adapter(HIDDEN), HIDDEN * torch.arange(8) + 0.5)


@torch.no_grad()
def test_adds_a_linear_map_of_low_rank() -> None:
    adapter = LowRankAdapter(8, 3)
    nn.init.normal_(adapter.up.weight)
    change = adapter(HIDDEN) - HIDDEN
    assert torch.linalg.matrix_rank(change.view(-1, 8), atol=1e-5) == 3
    torch.testing.assert_close(adapter(2 * HIDDEN) - 2 * HIDDEN, 2 * change)


def test_learns_from_the_start() -> None:
    """One factor is zero, so that the other gets its first gradient in the second step."""
    adapter = LowRankAdapter(8, 3)
    adapter(HIDDEN).square().sum().backward()
    assert adapter.up.weight.grad is not None
    assert adapter.up.weight.grad.abs().max() > 0
