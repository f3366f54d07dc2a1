from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from transformers import PreTrainedTokenizerFast

from modcompile.route_map import TOKENS_PER_ROW, Routes, draw_routes, find_routes, plot_routes
from tests.tiny_routed import tiny_grouped, tiny_routed

IDS = list(range(3, 12))


@pytest.mark.parametrize("make", [tiny_routed, tiny_grouped])
def test_routes_are_those_of_the_hard_model(make: object, tokenizer: PreTrainedTokenizerFast) -> None:
    assert callable(make)
    model = make("straight_through", use_cache=False)
    model.set_router_mode(0.5)
    with torch.no_grad():
        expected = [gate[0, :, 0].tolist() for gate in model(torch.tensor([IDS])).gates]
    model.set_router_mode(None)
    routes = find_routes(model, tokenizer, IDS, 0.5)
    assert routes.executed.tolist() == expected
    assert 0 < routes.executed.mean() < 1
    assert routes.layers == tuple(map(str, model.routed_layers))
    assert routes.tokens == tuple(tokenizer.decode([token]) for token in IDS)
    assert model.hard_thresholds is None
    assert find_routes(model, tokenizer, IDS, 0.0).executed.all()


def _routes(count: int) -> Routes:
    executed = np.arange(3 * count).reshape(3, count) % 2 == 0
    return Routes(tuple(f" token{index}" for index in range(count)), ("0", "2", "5"), executed)


@pytest.mark.parametrize(("count", "panels"), [(1, 1), (TOKENS_PER_ROW, 1), (TOKENS_PER_ROW + 3, 2)])
def test_every_token_is_under_its_column(count: int, panels: int) -> None:
    routes = _routes(count)
    drawn = draw_routes(routes).axes
    assert len(drawn) == panels
    labels = [label.get_text() for axes in drawn for label in axes.get_xticklabels()]
    assert labels == [token.strip() for token in routes.tokens]
    columns = np.concatenate([np.asarray(axes.images[0].get_array()) for axes in drawn], axis=1)
    assert np.array_equal(columns, routes.executed)
    assert [label.get_text() for label in drawn[0].get_yticklabels()] == ["0", "2", "5"]


def test_what_can_not_be_seen_has_a_sign() -> None:
    tokens = (" the", " ", "\n\n", "$x$", "  a", "不")
    (axes,) = draw_routes(Routes(tokens, ("0",), np.ones((1, 6), bool))).axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["the", "␣", "⏎⏎", "$x$", "␣a", "不"]


def test_is_written_whatever_the_script(tmp_path: Path) -> None:
    routes = Routes(("不", "$x", "\x00", " a"), ("0",), np.ones((1, 4), bool))
    plot_routes(routes, tmp_path / "routes.png")
    assert imread(tmp_path / "routes.png").ndim == 3
