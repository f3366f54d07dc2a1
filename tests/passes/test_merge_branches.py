import torch
from torch import fx, nn

from modcompile.passes.merge_branches import merge_branches
from modcompile.passes.replace_weights import replace_weights
from tests.passes.traced import BATCH, TOKENS, Run, calls, random, traced

_X = random(BATCH, TOKENS, 8)


def _branches() -> list[fx.GraphModule]:
    inner = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 8))
    gm = traced(Run(lambda self, x: self.inner(x), inner=inner), _X)
    names = ("module.inner.1.weight", "module.inner.3.weight")
    return [gm, *(replace_weights(gm, {name: random(8, 8, seed=seed) for name in names}, str(seed)) for seed in (4, 8))]


def test_keeps_every_output() -> None:
    branches = _branches()
    merged = merge_branches(branches)
    expected = [branch(_X)[0] for branch in branches]
    torch.testing.assert_close(list(merged(_X)), expected, rtol=0, atol=0)


def test_computes_once_what_branches_share() -> None:
    branches = _branches()
    merged = merge_branches(branches)
    assert calls(merged) == {"layer_norm": 1, "linear": 6, "silu": 3}
    assert {id(tensor) for tensor in merged.parameters()} == {id(tensor) for tensor in branches[0].parameters()}


def test_branches_that_are_the_same_become_one() -> None:
    branch = _branches()[0]
    merged = merge_branches([branch, branch])
    assert calls(merged) == calls(branch)
    assert torch.equal(*merged(_X))


def test_tensors_of_one_name_get_names_of_their_own() -> None:
    def branch(seed: int) -> fx.GraphModule:
        return traced(Run(lambda self, x: x * self.weight, weight=random(8, seed=seed)), _X)

    branches = [branch(1), branch(2)]
    merged = merge_branches(branches)
    torch.testing.assert_close(list(merged(_X)), [one(_X)[0] for one in branches], rtol=0, atol=0)
    assert {name for name, _ in merged.named_parameters()} == {"module.weight", "module.branch_1_weight"}


def test_what_is_random_is_drawn_for_each() -> None:
    gm = traced(Run(lambda _, x: x + torch.rand_like(x)), _X)
    first, second = merge_branches([gm, gm])(_X)
    assert not torch.equal(first, second)


def test_numbers_of_another_type_are_not_the_same() -> None:
    branches = [traced(Run(lambda _, x, by=by: x * by), _X.long()) for by in (1, 1.0)]
    first, second = merge_branches(branches)(_X.long())
    assert (first.dtype, second.dtype) == (torch.int64, torch.float32)
