import pytest
import torch

from modcompile.passes.equal_halves import has_equal_halves
from tests.passes.traced import BATCH, TOKENS, Function, Run, random, traced

_X = random(BATCH, TOKENS, 8)


def _told(function: Function) -> tuple[bool, bool]:
    """What the pass says of a function's result, and what is so."""
    gm = traced(Run(function), _X)
    known: set[torch.fx.Node] = set()
    for node in gm.graph.nodes:
        if has_equal_halves(node, known):
            known.add(node)
    (output,) = gm.graph.find_nodes(op="output")
    first, second = gm(_X)[0].chunk(2, -1)
    return output.args[0][0] in known, torch.equal(first, second)


@pytest.mark.parametrize(
    "function",
    [
        lambda _, x: torch.cat([x, x], -1),
        lambda _, x: torch.cat([x, x], 2),
        lambda _, x: torch.cat([x, x], -1).cos() * 1.5,
        lambda _, x: torch.cat([x, x], -1).sin().to(torch.float64) + 1,
    ],
)
def test_tells_equal_halves(function: Function) -> None:
    assert _told(function) == (True, True)


@pytest.mark.parametrize(
    "function",
    [
        lambda _, x: x,
        lambda _, x: torch.cat([x, -x], -1),
        lambda _, x: torch.cat([x, x, -x, x], -1),
        lambda _, x: torch.cat([x, x], 1),
        lambda _, x: torch.cat([x, x]),
        lambda _, x: torch.cat([x, x], -1) * torch.arange(16),
        lambda _, x: torch.cat([x, x], -1).cumsum(-1),
        lambda _, x: x.cos(),
    ],
)
def test_does_not_tell_them_of_others(function: Function) -> None:
    assert _told(function) == (False, False)


def test_a_tensor_added_in_part_may_differ() -> None:
    def function(_: Run, x: torch.Tensor) -> torch.Tensor:
        table = torch.cat([x, x], -1)
        return torch.add(table, table, alpha=2)

    assert _told(function)[0] is False
