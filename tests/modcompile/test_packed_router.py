import pytest
import torch
from torch import nn

from modcompile.packed_router import PackedRouter
from modcompile.passes.decide_precision import token_weights_of
from modcompile.precision_routers import PrecisionRouter

_MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]], dtype=torch.bool).unsqueeze(-1)


@pytest.mark.parametrize("for_tokens", [False, True])
@torch.no_grad()
def test_is_the_router_out_of_training(*, for_tokens: bool) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(2, 5, 96)
    router = PrecisionRouter(96, 3, dropout=0.5, for_tokens=for_tokens)
    nn.init.normal_(router.last.weight)
    packed = PackedRouter(router)
    weights = token_weights_of(_MASK)
    torch.testing.assert_close(packed(hidden, weights), router.eval()(hidden, weights))
    # Of the wide weights it holds codes alone.
    assert max(tensor.numel() for tensor in packed.state_dict().values() if tensor.is_floating_point()) < 128 * 8
