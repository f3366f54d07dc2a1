import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from modcompile.export.next_tokens import NextTokens


def test_greedy_takes_the_likeliest_of_each_row() -> None:
    config = GenerationConfig(do_sample=False)
    config.temperature, config.top_k, config.top_p = 9.0, 2, 0.1
    row = np.array([0, 3, 1, 3], np.float32)
    assert NextTokens(config, None).choose([row, -row, row * 2]) == [1, 0, 1]


@pytest.mark.parametrize(
    ("options", "allowed"),
    [({"top_k": 2}, 2), ({"top_k": 0, "top_p": 0.5}, 3), ({"temperature": 1e-4, "top_k": 0}, 1), ({"top_k": 0}, 9)],
)
def test_draws_from_those_that_the_options_leave(options: dict[str, float], allowed: int) -> None:
    row = np.log(np.array([0.02, 0.2, 0.22, 0.12, 0.1, 0.1, 0.09, 0.08, 0.07], np.float32))
    next_tokens = NextTokens(GenerationConfig(do_sample=True, **options), torch.Generator().manual_seed(0))
    drawn = {token for _ in range(40) for token in next_tokens.choose([row] * 20)}
    assert drawn == set(np.argsort(-row)[:allowed].tolist())


def test_draws_by_the_generator_each_row_its_own() -> None:
    config = GenerationConfig(do_sample=True, top_k=0)
    rows = [np.zeros(1000, np.float32)] * 4
    drawn = [NextTokens(config, torch.Generator().manual_seed(seed)).choose(rows) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) == 4
