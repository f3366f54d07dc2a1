import math

import torch

from modcompile.routing_totals import RoutingTotals

_LOSSES = ("lm_loss", "distill_loss")
_NAMES = ("active_ratio", "budget_loss")


def _add(totals: RoutingTotals, summed_loss: float, predicted: int, tokens: int, *summed: float) -> None:
    values = {"lm_loss": summed_loss, "distill_loss": 2 * summed_loss, **dict(zip(_NAMES, summed, strict=True))}
    scalars = {name: torch.tensor(value) for name, value in values.items()}
    totals.add(torch.tensor(predicted), torch.tensor(tokens), scalars)


def test_means_weigh_every_token_alike() -> None:
    totals = RoutingTotals(_LOSSES, _NAMES)
    _add(totals, 6.0, 3, 4, 2.0, 0.4)
    _add(totals, 1.0, 1, 2, 2.0, 0.0)
    losses = {"lm_loss": 7 / 4, "distill_loss": 14 / 4}
    assert totals.take() == losses | {"active_ratio": 4 / 6, "budget_loss": torch.tensor(0.4).item() / 6}


def test_begins_anew_once_taken() -> None:
    totals = RoutingTotals(_LOSSES, _NAMES)
    _add(totals, 6.0, 3, 4, 2.0, 0.5)
    totals.take()
    _add(totals, 2.0, 2, 2, 1.0, 0.0)
    assert totals.take() == {"lm_loss": 1.0, "distill_loss": 2.0, "active_ratio": 0.5, "budget_loss": 0.0}


def test_is_not_a_number_without_a_batch() -> None:
    assert all(math.isnan(value) for value in RoutingTotals(_LOSSES, _NAMES).take().values())
