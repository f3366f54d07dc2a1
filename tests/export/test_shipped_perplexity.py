import pytest
import torch
from transformers import GPT2Config, LlamaConfig, PretrainedConfig

from modcompile.export.shipped_perplexity import SHIPPED_LENGTH, perplexity, perplexity_rows, token_losses


def test_is_that_of_every_predicted_token() -> None:
    """The longer row counts for more."""
    probabilities = {3: 0.5, 1: 0.25, 2: 0.125}

    def logits(row: object) -> torch.Tensor:
        assert isinstance(row, list)
        found = torch.full((1, len(row), 4), -torch.inf)
        for place, token in enumerate(row[1:]):
            found[0, place] = torch.log(torch.tensor((1 - probabilities[token]) / 3))
            found[0, place, token] = torch.log(torch.tensor(probabilities[token]))
        return found

    assert perplexity(token_losses(logits, [[0, 3, 1, 1], [0, 2]])) == pytest.approx(
        (0.5 * 0.25 * 0.25 * 0.125) ** (-1 / 4)
    )


@pytest.mark.parametrize(
    ("config", "longest"),
    [(LlamaConfig(max_position_embeddings=4096), SHIPPED_LENGTH), (GPT2Config(n_positions=20), 20)],
)
def test_rows_are_no_longer_than_the_positions(config: PretrainedConfig, longest: int) -> None:
    rows = perplexity_rows(config, [range(1000), range(10)])
    assert rows == [list(range(longest)), list(range(10))]
