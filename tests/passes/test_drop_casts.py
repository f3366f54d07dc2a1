import torch

from modcompile.passes.drop_casts import drop_casts
from tests.passes.traced import BATCH, Run, calls, random, traced


def test_drops_casts_to_the_dtype_that_is_there() -> None:
    x = random(BATCH, 8)
    gm = traced(Run(lambda _, x: (x.to(torch.float32) * 2).float()), x)
    expected = gm(x)
    assert calls(gm)["to"] == 2
    assert drop_casts(gm.graph) == 2
    gm.recompile()
    assert calls(gm) == {"mul": 1}
    torch.testing.assert_close(gm(x), expected, rtol=0, atol=0)


def test_keeps_casts_between_dtypes() -> None:
    gm = traced(Run(lambda _, x: (x.to(torch.float64) * 2).float()), random(BATCH, 8))
    assert drop_casts(gm.graph) == 0
    assert calls(gm)["to"] == 2


def test_keeps_copies() -> None:
    gm = traced(Run(lambda _, x: x.to(torch.float32, copy=True)), random(BATCH, 8))
    assert drop_casts(gm.graph) == 0


def test_idempotent() -> None:
    gm = traced(Run(lambda _, x: x.to(torch.float32) * 2), random(BATCH, 8))
    assert drop_casts(gm.graph) == 1
    assert drop_casts(gm.graph) == 0
