import pytest
from torch import nn

from modcompile.share_of_parameters import describe_share, share_of_parameters


@pytest.fixture
def model() -> nn.Module:
    """6 parameters that are trained, 1,994 that are not."""
    model = nn.ModuleDict({"router": nn.Linear(2, 2), "base": nn.Linear(1994, 1, bias=False)})
    model["base"].requires_grad_(False)
    return model


def test_counts_what_is_trained_and_what_is_not(model: nn.Module) -> None:
    assert share_of_parameters(model) == {"trainable": 6, "base": 1994, "trainable_share": 0.003}


def test_a_shared_parameter_counts_once(model: nn.Module) -> None:
    shared = nn.ModuleList([model, model, model["router"]]) if isinstance(model, nn.ModuleDict) else model
    assert share_of_parameters(shared) == share_of_parameters(model)


def test_tells_a_person(model: nn.Module) -> None:
    assert describe_share(model) == "trainable: 6 of 2,000 parameters (0.300%)"


@pytest.mark.parametrize(("trained", "share"), [(True, 1.0), (False, 0.0)])
def test_all_or_nothing(model: nn.Module, trained: bool, share: float) -> None:
    assert share_of_parameters(model.requires_grad_(trained))["trainable_share"] == share
