from collections.abc import Callable

import pytest
import torch
from torch import fx
from torch.nn import functional

from modcompile.passes.fuse_skip_norm import fuse_skip_norm
from tests.passes.traced import BATCH, TOKENS, Run, calls, random, traced

X, Y, WEIGHT = random(BATCH, TOKENS, 8), random(BATCH, TOKENS, 8, seed=1), random(8, seed=2)

Body = Callable[[Run, torch.Tensor, torch.Tensor], tuple[torch.Tensor, ...] | torch.Tensor]


def norm(self: Run, x: torch.Tensor) -> torch.Tensor:
    return functional.rms_norm(x, [8], self.weight, 1e-5)


def graph_of(body: Body) -> fx.GraphModule:
    return traced(Run(body, WEIGHT), X, Y)


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(lambda self, x, y: (norm(self, s := x + y), s), id="both are read"),
        pytest.param(lambda self, x, y: norm(self, x + y), id="the norm alone is read"),
        pytest.param(lambda self, x, y: (s := x + y) + norm(self, s) * 2, id="the sum is read behind the norm"),
    ],
)
@torch.no_grad()
def test_fuses_a_sum_and_its_norm(body: Body) -> None:
    gm = graph_of(body)
    expected = gm(X, Y)
    assert fuse_skip_norm(gm.graph) == 1
    gm.recompile()
    assert calls(gm)["skip_rms_norm"] == 1
    assert calls(gm)["rms_norm"] == 0
    torch.testing.assert_close(gm(X, Y), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(lambda self, x, y: norm(self, x * y), id="a product"),
        pytest.param(lambda self, x, y: norm(self, x + 1), id="a number"),
        pytest.param(lambda self, x, y: norm(self, torch.add(x, y, alpha=2)), id="a sum with a factor"),
        pytest.param(lambda self, x, y: norm(self, x + y[:, :1]), id="a sum that broadcasts"),
        pytest.param(lambda self, x, y: functional.rms_norm(x + y, [8], None, 1e-5), id="a norm without a weight"),
        pytest.param(lambda self, x, y: functional.rms_norm(x + y, [8], self.weight), id="a norm without its epsilon"),
        pytest.param(lambda self, x, y: _read_before(self, x, y), id="the sum is read before the norm"),
    ],
)
@torch.no_grad()
def test_leaves_alone_what_is_something_else(body: Body) -> None:
    gm = graph_of(body)
    before = gm.code
    assert fuse_skip_norm(gm.graph) == 0
    gm.recompile()
    assert gm.code == before


def _read_before(self: Run, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    total = x + y
    early = total.relu()
    return norm(self, total) + early
