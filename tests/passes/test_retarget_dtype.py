import torch

from modcompile.passes.retarget_dtype import retarget_dtype
from tests.passes.traced import BATCH, TOKENS, Run, random, traced

_X = random(BATCH, TOKENS, 8).double()


def _square(_: Run, x: torch.Tensor) -> torch.Tensor:
    """In float32, where the square of so small a number is none."""
    return (x.to(torch.float32) * 1e-30).square().to(torch.float64) + torch.zeros(8, dtype=torch.float32)


def test_computes_in_the_other_dtype() -> None:
    gm = traced(Run(_square), _X)
    assert not gm(_X)[0].any()
    assert retarget_dtype(gm, torch.float32, torch.float64)
    torch.testing.assert_close(gm(_X)[0], (_X * 1e-30).square())
    assert not retarget_dtype(gm, torch.float32, torch.float64)


def test_leaves_other_dtypes_alone() -> None:
    gm = traced(Run(lambda _, x: x.to(torch.int64) * 2), _X)
    before = gm.code
    assert not retarget_dtype(gm, torch.float32, torch.float64)
    assert gm.code == before
