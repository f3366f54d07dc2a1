import pytest
import torch

from modcompile.passes.gather_tokens import gather_tokens
from tests.passes.traced import random

_INDEX = torch.tensor([[0, 4, 4], [3, 2, 1]])


@pytest.mark.parametrize("sizes", [(), (1,), (2, 3)])
def test_takes_tokens_of_each_row(sizes: tuple[int, ...]) -> None:
    x = random(2, 5, *sizes)
    expected = torch.stack([row[index] for row, index in zip(x, _INDEX, strict=True)])
    torch.testing.assert_close(gather_tokens(x, _INDEX), expected, rtol=0, atol=0)
    torch.library.opcheck(gather_tokens, (x, _INDEX), test_utils=("test_schema", "test_faketensor"))
