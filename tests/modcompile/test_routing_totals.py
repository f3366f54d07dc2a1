import math

import torch

from modcompile.routing_totals import RoutingTotals

_NAMES = ("active_ratio", "budget_loss")


def _add(totals: RoutingTotals, summed_loss: float, predicted: int, tokens: int, *summed: float) -> None:
    first, second, third = (torch.tensor(value) for value in (summed_loss, predicted, tokens))
    totals.add(first, second, third, {name: torch.tensor(value) for name, value in zip(_NAMES, summed, strict=True)})


def test_means_weigh_every_token_alike() -> None:
    totals = RoutingTotals(_NAMES)
    _add(totals, 6.0, 3, 4, 2.0, 0.4)
    _add(totals, 1.0, 1, 2, 2.0, 0.0)
    means = totals.take()
    assert means == {"lm_loss": 7 / 4, "active_ratio": 4 / 6, "budget_loss": torch.tensor(0.4).item() / 6}


def test_begins_anew_once_taken() -> None:
    totals = RoutingTotals(_NAMES)
    _add(totals, 6.0, 3, 4, 2.0, 0.5)
    totals.take()
    _add(totals, 2.0, 2, 2, 1.0, 0.0)
    assert totals.take() == {"lm_loss": 1.0, "active_ratio": 0.5, "budget_loss": 0.0}


def test_is_not_a_number_without_a_batch() -> None:
    assert all(math.isnan(value) for value in RoutingTotals(_NAMES).take().values())
