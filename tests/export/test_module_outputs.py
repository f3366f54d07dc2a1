import pytest
import torch
from torch import nn

from modcompile.export.module_outputs import module_outputs


def test_gives_what_each_returns_inside_the_block() -> None:
    first, second = nn.Linear(2, 3), nn.Linear(3, 1)
    x = torch.ones(4, 2)
    with module_outputs({7: first, 9: second}) as found:
        hidden = first(x)
        last = [second(hidden), second(hidden + 1)]
    second(hidden)
    assert list(found) == [7, 9]
    assert [each is hidden for each in found[7]] == [True]
    assert [each is wanted for each, wanted in zip(found[9], last, strict=True)] == [True, True]


def test_leaves_the_modules_alone_after_an_error() -> None:
    module = nn.Linear(2, 3)

    def fail() -> None:
        with module_outputs({0: module}):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not module._forward_hooks
