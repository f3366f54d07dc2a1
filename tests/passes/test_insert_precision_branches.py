import pytest
import torch
from torch import fx, nn
from transformers import PreTrainedModel

from modcompile.passes.insert_precision_branches import TokenMask, insert_precision_branches
from tests.model_inputs import make_inputs
from tests.passes.block_versions import branches_of, with_blocks
from tests.passes.traced import calls
from tests.tiny_graphs import outlined_graph

_LAYERS = (0, 2)


class _Fixed(nn.Module):
    """Logits that do not depend on the token, and the mask that came in."""

    def __init__(self, *logits: float) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))
        self.mask = torch.empty(0)

    def forward(self, hidden: torch.Tensor, token_mask: torch.Tensor) -> torch.Tensor:
        self.mask = token_mask
        return self.logits.expand(hidden.shape[0], -1)


class _Softmax(nn.Module):
    def forward(self, router_logits: torch.Tensor) -> torch.Tensor:
        return router_logits.softmax(-1).unsqueeze(1)


@pytest.fixture(scope="module")
def dense(architecture: str) -> fx.GraphModule:
    return outlined_graph(architecture, use_cache=False)


@pytest.mark.parametrize("chosen", range(3))
@torch.no_grad()
def test_one_branch_alone_stands_in_the_place_of_the_block(
    dense: fx.GraphModule, model: PreTrainedModel, chosen: int
) -> None:
    branches = {layer: branches_of(dense, layer) for layer in _LAYERS}
    logits = [200.0 * (index == chosen) for index in range(3)]
    routers = {layer: _Fixed(*logits) for layer in _LAYERS}
    gm = insert_precision_branches(dense, branches, routers, _Softmax())
    inputs = make_inputs(model, 3, 5, 0, "left", 0)
    actual, *weights = gm(*inputs.tokens)
    expected = with_blocks(dense, {layer: list(branches[layer].values())[chosen] for layer in _LAYERS})(*inputs.tokens)
    torch.testing.assert_close(inputs.at_tokens([actual]), inputs.at_tokens(expected), rtol=0, atol=1e-6)
    assert [tuple(weight.shape) for weight in weights] == [(3, 1, 3)] * len(_LAYERS)
    for router in routers.values():
        assert torch.equal(router.mask.squeeze(-1), inputs.is_token)


def test_mixes_by_the_weights_and_trains_the_routers(dense: fx.GraphModule, model: PreTrainedModel) -> None:
    branches, routers = {0: branches_of(dense, 0)}, {0: _Fixed(0.1, 0.2, 0.3)}
    gm = insert_precision_branches(dense, branches, routers, _Softmax())
    block = gm.get_submodule("blocks.0")
    assert isinstance(block, fx.GraphModule)
    inputs = make_inputs(model, 2, 4, 0, "none", 0)
    hidden: list[torch.Tensor] = []
    block.register_forward_hook(lambda _, args, output: hidden.extend([args[0], *args[1:-1], output[0]]))
    logits, _ = gm(*inputs.tokens)
    with torch.no_grad():
        outputs = [branch(*hidden[:-1])[0] for branch in branches[0].values()]
        weights = torch.tensor([0.1, 0.2, 0.3]).softmax(-1)
        expected = sum(weight * output for weight, output in zip(weights, outputs, strict=True))
    torch.testing.assert_close(hidden[-1], expected)
    logits.square().mean().backward()
    assert routers[0].logits.grad is not None
    assert routers[0].logits.grad.abs().min() > 0


def test_branches_share_what_comes_before_their_weights(dense: fx.GraphModule, architecture: str) -> None:
    branches = {0: branches_of(dense, 0)}
    gm = insert_precision_branches(dense, branches, {0: _Fixed(0.0, 0.0, 0.0)}, _Softmax())
    merged = gm.get_submodule("blocks.0.branches")
    assert isinstance(merged, fx.GraphModule)
    one = calls(branches[0][16])
    norm = "layer_norm" if architecture in ("opt", "gpt2") else "rsqrt"
    # That before attention is one for all; that before the MLP each branch has for itself.
    assert (one[norm], calls(merged)[norm]) == (2, 4)
    assert calls(merged)["linear"] == 3 * one["linear"]


def test_the_mask_is_that_of_the_new_tokens() -> None:
    mask = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1]])
    assert TokenMask()(torch.zeros(2, 2, dtype=torch.long), mask).squeeze(-1).tolist() == [[True, False], [True, True]]
