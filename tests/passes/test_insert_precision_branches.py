import pytest
import torch
from torch import fx, nn
from torch.nn.functional import one_hot
from transformers import PreTrainedModel

from modcompile.passes.choose_precision import choose_precision
from modcompile.passes.insert_precision_branches import TokenWeights, insert_precision_branches
from tests.model_inputs import make_inputs
from tests.passes.block_versions import branches_of, with_blocks
from tests.passes.traced import calls
from tests.tiny_graphs import outlined_graph

_LAYERS = (0, 2)


class _Fixed(nn.Module):
    """Logits that do not depend on the token, and the weights of tokens that came in."""

    def __init__(self, *logits: float) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))
        self.token_weights = torch.empty(0)

    def forward(self, hidden: torch.Tensor, token_weights: torch.Tensor) -> torch.Tensor:
        self.token_weights = token_weights
        return self.logits.expand(hidden.shape[0], 1, -1)


class _Softmax(nn.Module):
    def forward(self, router_logits: torch.Tensor) -> torch.Tensor:
        return router_logits.softmax(-1)


class _Largest(nn.Module):
    def forward(self, router_logits: torch.Tensor) -> torch.Tensor:
        return one_hot(router_logits.argmax(-1), router_logits.shape[-1]).float()


class _OfEachToken(nn.Module):
    def forward(self, hidden: torch.Tensor, token_weights: torch.Tensor) -> torch.Tensor:
        return hidden[..., :3] * 10


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
        mean = inputs.is_token / inputs.is_token.sum(1, keepdim=True)
        torch.testing.assert_close(router.token_weights.squeeze(-1), mean)


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


def test_the_weights_are_those_of_the_new_tokens() -> None:
    mask = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1], [1, 1, 0, 0]])
    weights = TokenWeights()(torch.zeros(3, 2, dtype=torch.long), mask).squeeze(-1)
    assert weights.tolist() == [[1, 0], [0.5, 0.5], [0, 0]]


@torch.no_grad()
def test_with_a_cache_it_is_what_is_chosen_for_tokens(outlined: fx.GraphModule, model: PreTrainedModel) -> None:
    branches = {layer: branches_of(outlined, layer) for layer in _LAYERS}
    routers = {layer: _OfEachToken() for layer in _LAYERS}
    mixed = insert_precision_branches(outlined, branches, routers, _Largest())
    chosen = choose_precision(outlined, branches, routers, for_tokens=True)
    inputs = make_inputs(model, 2, 6, 0, "left", 0)
    logits, *rest = mixed(*inputs.flat)
    expected, *others = chosen(*inputs.flat)
    torch.testing.assert_close(inputs.at_tokens([logits]), inputs.at_tokens([expected]))
    bits = [torch.tensor([4, 8, 16])[weights.argmax(-1)] for weights in rest[-2:]]
    assert all(torch.equal(a[inputs.is_token], b[inputs.is_token]) for a, b in zip(bits, others[-2:], strict=True))


def test_sampled_one_branch_of_each_block_runs(dense: fx.GraphModule, model: PreTrainedModel) -> None:
    branches = {layer: branches_of(dense, layer) for layer in _LAYERS}
    routers = {layer: _Fixed(1.0, 2.0, 3.0) for layer in _LAYERS}
    gm = insert_precision_branches(dense, branches, routers, _Softmax(), sampled=True).train()
    ran: list[str] = []
    for layer in _LAYERS:
        for index in range(3):
            name = f"blocks.{layer}.branches.branches.{index}"
            gm.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.append(name))
    inputs = make_inputs(model, 2, 4, 0, "none", 0)
    torch.manual_seed(0)
    logits, *_ = gm(*inputs.tokens)
    assert len(ran) == len(_LAYERS)
    drawn = {layer: list(branches[layer].values())[int(name[-1])] for layer, name in zip(_LAYERS, ran, strict=True)}
    torch.testing.assert_close(logits, with_blocks(dense, drawn)(*inputs.tokens)[0], rtol=0, atol=0)
    logits.square().mean().backward()
    assert all(router.logits.grad is not None and bool(router.logits.grad.any()) for router in routers.values())


class _Score(nn.Module):
    """Depth logits: some of the tokens are open, as good as at random."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return (hidden.sum(-1, keepdim=True) * 100).sin()


class _Hard(nn.Module):
    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        return (logits > 0).float()


@pytest.mark.parametrize("for_tokens", [False, True])
@torch.no_grad()
def test_with_gates_it_is_what_is_chosen_with_gates(
    outlined: fx.GraphModule, dense: fx.GraphModule, model: PreTrainedModel, *, for_tokens: bool
) -> None:
    graph = outlined if for_tokens else dense
    inputs = make_inputs(model, 2 if for_tokens else 1, 6, 0, "left" if for_tokens else "none", 0)
    routers = {layer: _OfEachToken() if for_tokens else _Fixed(1.0, 3.0, 2.0) for layer in _LAYERS}
    depth = {2: _Score()}
    mixed = insert_precision_branches(
        graph,
        {layer: branches_of(graph, layer) for layer in _LAYERS},
        routers,
        _Largest(),
        depth_routers=depth,
        gate=_Hard(),
    )
    chosen = choose_precision(
        outlined,
        {layer: branches_of(outlined, layer) for layer in _LAYERS},
        routers,
        for_tokens=for_tokens,
        depth_routers=depth,
    )
    logits, *rest = mixed(*(inputs.flat if for_tokens else inputs.tokens))
    expected, *others = chosen(*inputs.flat)
    torch.testing.assert_close(inputs.at_tokens([logits]), inputs.at_tokens([expected]), rtol=1e-4, atol=1e-4)
    first, last, gate = rest[-3:]
    assert first.shape[-1] == last.shape[-1] == 3
    assert 0 < int(gate[inputs.is_token].sum()) < int(inputs.is_token.sum())
    assert torch.equal((others[-1] > 0)[inputs.is_token], (gate.squeeze(-1) > 0)[inputs.is_token])
