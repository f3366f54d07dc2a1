import torch

from modcompile.passes.open_tokens import gather_open, open_tokens, scatter_open
from tests.passes.traced import random

X = random(2, 3, 4)
IS_OPEN = torch.tensor([[True, False, True], [False, False, True]]).unsqueeze(-1)


def test_tells_row_and_place_of_each_open_token_in_order() -> None:
    assert open_tokens(IS_OPEN).tolist() == [[0, 0], [0, 2], [1, 2]]


def test_takes_tokens_out_and_puts_others_in_their_place() -> None:
    places = open_tokens(IS_OPEN)
    assert torch.equal(gather_open(X, places), X[IS_OPEN.squeeze(-1)])
    torch.testing.assert_close(scatter_open(X, places, gather_open(X, places) + 1), torch.where(IS_OPEN, X + 1, X))


def test_of_no_token_nothing_changes() -> None:
    places = open_tokens(torch.zeros_like(IS_OPEN))
    assert gather_open(X, places).shape == (0, 4)
    assert torch.equal(scatter_open(X, places, gather_open(X, places)), X)


def test_the_fakes_have_as_many_rows_as_are_open() -> None:
    for operator, inputs in (
        (open_tokens, (IS_OPEN,)),
        (gather_open, (X, open_tokens(IS_OPEN))),
        (scatter_open, (X, open_tokens(IS_OPEN), random(3, 4))),
    ):
        torch.library.opcheck(operator, inputs, test_utils=("test_schema", "test_faketensor"))
