import pytest
import torch

from modcompile.passes.cancel_layouts import cancel_layouts
from modcompile.passes.eliminate_dead_code import eliminate_dead_code
from tests.passes.traced import BATCH, TOKENS, Function, Run, calls, random, traced

_X = random(BATCH, TOKENS, 32)


def _heads(x: torch.Tensor) -> torch.Tensor:
    return x.view(x.shape[0], x.shape[1], 4, 8).transpose(1, 2)


@pytest.mark.parametrize(
    ("function", "left"),
    [
        pytest.param(lambda _, x: _heads(x).transpose(1, 2).reshape(x.shape), {}, id="split and merged"),
        pytest.param(lambda _, x: x.transpose(1, 2).transpose(2, 1), {}, id="transposed twice"),
        pytest.param(lambda _, x: x.view(x.shape), {}, id="the same shape"),
        pytest.param(
            lambda _, x: x.view(x.shape[0], -1, 16).view(x.shape[0], x.shape[1], 4, 8), {"view": 1}, id="two views"
        ),
        pytest.param(lambda _, x: _heads(x), {"view": 1, "transpose": 1}, id="heads that stay"),
        pytest.param(lambda _, x: x.transpose(0, 1).transpose(1, 2), {"transpose": 2}, id="other dimensions"),
    ],
)
def test_leaves_what_is_needed(function: Function, left: dict[str, int]) -> None:
    gm = traced(Run(lambda self, x: function(self, x * 2)), _X)
    (expected,) = gm(_X)
    expected = expected.clone()
    changed = sum(calls(gm)[name] for name in ("view", "reshape", "transpose")) > sum(left.values())
    assert (cancel_layouts(gm.graph) > 0) == changed
    eliminate_dead_code(gm.graph)
    gm.recompile()
    assert {name: count for name, count in calls(gm).items() if name not in ("mul", "sym_size")} == left
    torch.testing.assert_close(gm(_X)[0], expected, rtol=0, atol=0)


def test_an_inner_view_that_others_use_stays() -> None:
    def function(_: Run, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        flat = x.view(x.shape[0], -1)
        return flat * 2, flat.view(x.shape)

    gm = traced(Run(function), _X)
    expected = gm(_X)
    cancel_layouts(gm.graph)
    eliminate_dead_code(gm.graph)
    gm.recompile()
    assert calls(gm)["view"] == 1
    torch.testing.assert_close(gm(_X), expected, rtol=0, atol=0)
