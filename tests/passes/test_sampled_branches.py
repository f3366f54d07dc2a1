import pytest
import torch
from torch import fx

from modcompile.passes.mix_branches import WeightedSum, mix_branches
from modcompile.passes.sampled_branches import SampledBranches
from tests.passes.traced import BATCH, TOKENS, Run, random, traced

_X = random(BATCH, TOKENS, 8)


def _branches() -> list[fx.GraphModule]:
    return [traced(Run(lambda self, x: x + x * self.weight, weight=random(8, seed=seed)), _X) for seed in range(3)]


@pytest.fixture
def sampled() -> SampledBranches:
    branches = _branches()
    return SampledBranches(branches, mix_branches(branches, WeightedSum()))


def _weights(logits: torch.Tensor) -> torch.Tensor:
    return logits.softmax(-1)


def test_in_training_one_branch_runs(sampled: SampledBranches) -> None:
    expected = [branch(_X)[0] for branch in sampled.branches]
    seen = set()
    for seed in range(20):
        torch.manual_seed(seed)
        (actual,) = sampled(_X, _weights(torch.zeros(BATCH, 1, 3)))
        seen.add(next(index for index, value in enumerate(expected) if torch.equal(actual, value)))
    assert seen == {0, 1, 2}


def test_out_of_training_all_are_mixed(sampled: SampledBranches) -> None:
    weights = _weights(random(BATCH, 1, 3))
    assert torch.equal(sampled.eval()(_X, weights)[0], sampled.mixed(_X, weights)[0])


def test_its_gradient_is_on_average_that_of_the_mixture(sampled: SampledBranches) -> None:
    logits = random(BATCH, 1, 3, seed=5).requires_grad_()
    direction = random(BATCH, TOKENS, 8, seed=6)
    (expected,) = torch.autograd.grad((sampled.mixed(_X, _weights(logits))[0] * direction).sum(), logits)
    weights = _weights(logits)
    chances = weights.detach().flatten(0, -2).mean(0)
    total = torch.zeros_like(expected)
    drawn = set[int]()
    # By what is drawn and how often, rather than by many draws.
    for seed in range(200):
        torch.manual_seed(seed)
        index = int(torch.multinomial(chances, 1))
        if index not in drawn:
            drawn.add(index)
            torch.manual_seed(seed)
            (gradient,) = torch.autograd.grad((sampled(_X, _weights(logits))[0] * direction).sum(), logits)
            total += gradient * chances[index]
    assert drawn == {0, 1, 2}
    torch.testing.assert_close(total, expected)
