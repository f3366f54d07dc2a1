import math

import pytest
import torch

from modcompile.routing_totals import RoutingTotals

_LOSSES = ("lm_loss", "distill_loss")
_NAMES = ("active_ratio", "budget_loss")


def _add(totals: RoutingTotals, summed_loss: float, predicted: int, tokens: int, *summed: float) -> None:
    values = {"lm_loss": summed_loss, "distill_loss": 2 * summed_loss, **dict(zip(_NAMES, summed, strict=True))}
    scalars = {name: torch.tensor(value) for name, value in values.items()}
    totals.add(torch.tensor(predicted), torch.tensor(tokens), scalars)


def _floats(totals: RoutingTotals) -> dict[str, float]:
    return {name: float(mean) for name, mean in totals.take().items()}


def test_means_weigh_every_token_alike() -> None:
    totals = RoutingTotals(_LOSSES, _NAMES)
    _add(totals, 6.0, 3, 4, 2.0, 0.4)
    _add(totals, 1.0, 1, 2, 2.0, 0.0)
    losses = {"lm_loss": 7 / 4, "distill_loss": 14 / 4}
    assert _floats(totals) == pytest.approx(losses | {"active_ratio": 4 / 6, "budget_loss": 0.4 / 6})


def test_what_is_known_of_each_layer_stays_apart() -> None:
    totals = RoutingTotals((), ("active_ratio",))
    for active in ([1.0, 2.0], [3.0, 0.0]):
        totals.add(torch.tensor(3), torch.tensor(4), {"active_ratio": torch.tensor(active)})
    assert totals.take()["active_ratio"].tolist() == [4 / 8, 2 / 8]


def test_begins_anew_once_taken() -> None:
    totals = RoutingTotals(_LOSSES, _NAMES)
    _add(totals, 6.0, 3, 4, 2.0, 0.5)
    totals.take()
    _add(totals, 2.0, 2, 2, 1.0, 0.0)
    assert _floats(totals) == {"lm_loss": 1.0, "distill_loss": 2.0, "active_ratio": 0.5, "budget_loss": 0.0}


def test_is_not_a_number_without_a_batch() -> None:
    assert all(math.isnan(value) for value in RoutingTotals(_LOSSES, _NAMES).take().values())
