import torch
from torch import nn

from modcompile.passes.replace_weights import replace_weights
from tests.passes.traced import BATCH, TOKENS, Run, calls, random, traced

_X = random(BATCH, TOKENS, 8)


def test_multiplies_by_the_other_weight() -> None:
    linear = nn.Linear(8, 8)
    gm = traced(Run(lambda self, x: self.inner(x), inner=linear), _X)
    other = random(8, 8, seed=3)
    replaced = replace_weights(gm, {"module.inner.weight": other}, "4")
    torch.testing.assert_close(replaced(_X)[0], nn.functional.linear(_X, other, linear.bias))
    assert dict(replaced.named_buffers()).keys() == {"module.inner.weight_4"}
    assert {name for name, _ in replaced.named_parameters()} == {"module.inner.bias", "module.weight"}
    assert calls(replaced) == calls(gm)
    torch.testing.assert_close(gm(_X)[0], linear(_X))


def test_shares_what_is_not_replaced() -> None:
    linear = nn.Linear(8, 8)
    gm = traced(Run(lambda self, x: self.inner(x) * self.weight, inner=linear), _X)
    replaced = replace_weights(gm, {"module.inner.weight": random(8, 8)}, "4")
    assert replaced.get_parameter("module.inner.bias") is linear.bias
    assert replaced.get_parameter("module.weight") is gm.get_parameter("module.weight")
