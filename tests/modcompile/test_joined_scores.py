import pytest
import torch
from torch import nn

from modcompile.joined_scores import join_scores
from modcompile.routers import DepthScore, LinearScore

_HIDDEN, _INNER, _COUNT = 6, 4, 3


def _score(inner: int, *, layer_norm: bool) -> nn.Module:
    if inner:
        score: nn.Module = DepthScore(_HIDDEN, inner, dropout=0.5, layer_norm=layer_norm)
    else:
        score = LinearScore(_HIDDEN, layer_norm=layer_norm)
    for parameter in score.parameters():
        nn.init.normal_(parameter)
    return score.eval()


@pytest.mark.parametrize("inner", [_INNER, 0], ids=["hidden layer", "linear"])
@pytest.mark.parametrize("layer_norm", [True, False])
@torch.no_grad()
def test_gives_each_score_of_each_token(inner: int, layer_norm: bool) -> None:
    torch.manual_seed(0)
    scores = [_score(inner, layer_norm=layer_norm) for _ in range(_COUNT)]
    joined = join_scores(scores)
    assert joined is not None
    hidden = torch.randn(2, 5, _HIDDEN)
    torch.testing.assert_close(joined(hidden), torch.cat([score(hidden) for score in scores], -1))
    products = [module for module in joined.modules() if isinstance(module, nn.Linear)]
    assert len(products) == (2 if inner else 1)


def test_leaves_the_scores_as_they_are() -> None:
    scores = [_score(_INNER, layer_norm=True) for _ in range(_COUNT)]
    before = [{name: tensor.clone() for name, tensor in score.state_dict().items()} for score in scores]
    joined = join_scores(scores)
    assert joined is not None
    for parameter in joined.parameters():
        parameter.zero_()
    for score, state in zip(scores, before, strict=True):
        assert all(torch.equal(tensor, state[name]) for name, tensor in score.state_dict().items())


@pytest.mark.parametrize(
    "scores",
    [
        pytest.param([_score(0, layer_norm=True), _score(_INNER, layer_norm=True)], id="linear or not"),
        pytest.param([_score(0, layer_norm=True), _score(0, layer_norm=False)], id="with a norm or not"),
        pytest.param([nn.Linear(_HIDDEN, 1), nn.Linear(_HIDDEN, 1)], id="of another kind"),
        pytest.param([_score(0, layer_norm=False), nn.Linear(_HIDDEN, 1)], id="one of another kind"),
    ],
)
def test_joins_none_that_differ_or_that_it_does_not_know(scores: list[nn.Module]) -> None:
    assert join_scores(scores) is None
