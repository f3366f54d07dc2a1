import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx, nn
from transformers import PreTrainedModel

from modcompile.passes.choose_precision import choose_precision
from modcompile.passes.replace_weights import replace_weights
from modcompile.passes.skip_block import skip_block
from tests.model_inputs import Padding, make_inputs
from tests.passes.block_versions import branches_of, with_blocks

_LAYERS = (0, 2)


class _OfTheFirstToken(nn.Module):
    """Logits `[B, 1, P]` that the first token of a row decides, whatever else there is."""

    def __init__(self, num_precisions: int = 3) -> None:
        super().__init__()
        self.num_precisions = num_precisions

    def forward(self, hidden: torch.Tensor, token_weights: torch.Tensor) -> torch.Tensor:
        return hidden[:, :1, : self.num_precisions] * 10


class _OfEachToken(nn.Module):
    """Logits `[B, T, P]`, of every token by itself."""

    def forward(self, hidden: torch.Tensor, token_weights: torch.Tensor) -> torch.Tensor:
        return hidden[..., :3] * 10


class _Score(nn.Module):
    """Of a depth gate: about half of the tokens are above 0."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden[..., 4:5]


@pytest.fixture(scope="module")
def chosen(outlined: fx.GraphModule) -> fx.GraphModule:
    branches = {layer: branches_of(outlined, layer) for layer in _LAYERS}
    return choose_precision(outlined, branches, {layer: _OfTheFirstToken() for layer in _LAYERS})


def _forced(gm: fx.GraphModule, choices: tuple[int, ...]) -> None:
    bias = gm.get_buffer("precision_bias")
    bias.zero_()
    for row, choice in zip(bias, choices, strict=True):
        row[choice] = torch.inf


@given(
    choices=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    length=st.integers(1, 6),
    past=st.integers(0, 5),
    padding=st.sampled_from(["none", "left", "right"]),
)
@torch.no_grad()
def test_is_the_graph_with_the_chosen_branches(
    outlined: fx.GraphModule,
    chosen: fx.GraphModule,
    model: PreTrainedModel,
    choices: tuple[int, int],
    length: int,
    past: int,
    padding: Padding,
) -> None:
    inputs = make_inputs(model, 2, length, past, padding, 0)
    _forced(chosen, choices)
    *actual, first, last = chosen(*inputs.flat)
    blocks = {
        layer: list(branches_of(outlined, layer).values())[choice]
        for layer, choice in zip(_LAYERS, choices, strict=True)
    }
    expected = with_blocks(outlined, blocks)(*inputs.flat)
    torch.testing.assert_close(actual, list(expected), rtol=0, atol=0)
    assert [int(bits.unique()) for bits in (first, last)] == [(4, 8, 16)[choice] for choice in choices]
    assert first.shape == (2, length)
    assert first.dtype == torch.int64


@torch.no_grad()
def test_runs_the_chosen_branch_alone(chosen: fx.GraphModule, model: PreTrainedModel) -> None:
    ran: list[str] = []
    hooks = [
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
        for name, module in chosen.named_modules()
        if name.split(".")[-1] in ("branch_0", "nothing", "take_1", "take_2", "keep")
    ]
    inputs = make_inputs(model, 2, 4, 0, "none", 0)
    for choice, expected in enumerate(
        (["branch_0", "keep", "keep"], ["nothing", "take_1", "keep"], ["nothing", "keep", "take_2"])
    ):
        ran.clear()
        _forced(chosen, (choice, choice))
        chosen(*inputs.flat)
        assert ran == [f"blocks.{layer}.{name}" for layer in _LAYERS for name in expected]
    for hook in hooks:
        hook.remove()


def test_one_precision_needs_no_choice(outlined: fx.GraphModule, model: PreTrainedModel) -> None:
    branch = branches_of(outlined, 0)[4]
    gm = choose_precision(outlined, {0: {4: branch}}, {0: _OfTheFirstToken(1)})
    inputs = make_inputs(model, 2, 4, 3, "left", 0)
    with torch.no_grad():
        *actual, choice = gm(*inputs.flat)
        expected = with_blocks(outlined, {0: branch})(*inputs.flat)
    torch.testing.assert_close(actual, list(expected), rtol=0, atol=0)
    assert bool((choice == 4).all())


@pytest.fixture(scope="module")
def of_tokens(outlined: fx.GraphModule) -> fx.GraphModule:
    branches = {layer: branches_of(outlined, layer) for layer in _LAYERS}
    return choose_precision(outlined, branches, {layer: _OfEachToken() for layer in _LAYERS}, for_tokens=True)


@pytest.fixture(scope="module")
def skipping(outlined: fx.GraphModule) -> fx.GraphModule:
    branches = {layer: branches_of(outlined, layer) for layer in _LAYERS}
    routers = {layer: _OfEachToken() for layer in _LAYERS}
    return choose_precision(outlined, branches, routers, for_tokens=True, depth_routers={2: _Score()})


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@torch.no_grad()
def test_decided_for_tokens_a_row_does_not_depend_on_the_others(
    of_tokens: fx.GraphModule, skipping: fx.GraphModule, model: PreTrainedModel, padding: Padding
) -> None:
    for gm in (of_tokens, skipping):
        inputs = make_inputs(model, 3, 6, 0, padding, 1)
        together = gm(*inputs.flat)
        for row in range(3):
            alone = gm(*(tensor[row : row + 1] for tensor in inputs.flat))
            is_token = inputs.is_token[row]
            torch.testing.assert_close(together[0][row][is_token], alone[0][0][is_token], rtol=1e-4, atol=1e-4)
            for bits, own in zip(together[-2:], alone[-2:], strict=True):
                assert torch.equal(bits[row][is_token], own[0][is_token])


@torch.no_grad()
def test_decided_for_tokens_a_later_call_goes_on_where_the_first_ended(
    of_tokens: fx.GraphModule, skipping: fx.GraphModule, model: PreTrainedModel
) -> None:
    for gm in (of_tokens, skipping):
        inputs = make_inputs(model, 2, 7, 0, "none", 3)
        ids, mask, positions, *past = inputs.flat
        logits, *rest = gm(*inputs.flat)
        cut = len(rest) - len(_LAYERS)
        assert len(rest[-1].unique()) > 1
        parts = []
        for token in range(7):
            columns = slice(token, token + 1)
            part, *state = gm(ids[:, columns], mask[:, : token + 1], positions[:, columns], *past)
            parts.append((part, *state[cut:]))
            past = state[:cut]
        stepwise = [torch.cat(values, 1) for values in zip(*parts, strict=True)]
        torch.testing.assert_close(stepwise[0], logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(past, rest[:cut], rtol=1e-4, atol=1e-4)
        assert all(map(torch.equal, stepwise[1:], rest[cut:]))


@torch.no_grad()
def test_decided_for_tokens_each_has_its_own_branch(
    outlined: fx.GraphModule, of_tokens: fx.GraphModule, model: PreTrainedModel
) -> None:
    inputs = make_inputs(model, 2, 6, 4, "left", 2)
    _, *_, first, _ = of_tokens(*inputs.flat)
    hidden: list[torch.Tensor] = []
    block = of_tokens.get_submodule("blocks.0")
    assert isinstance(block, fx.GraphModule)
    hook = block.register_forward_hook(lambda _, args, outputs: hidden.extend([*args, *outputs]))
    of_tokens(*inputs.flat)
    hook.remove()
    (key, value), past = hidden[-3:-1], inputs.flat[3].shape[2]
    branches = branches_of(outlined, 0)
    taken = len(next(iter(branches.values())).graph.find_nodes(op="placeholder"))
    for bits, branch in branches.items():
        _, own_key, own_value = branch(*hidden[:taken])
        chose = (first == bits) & inputs.is_token
        for mixed, own in ((key, own_key), (value, own_value)):
            new, expected = (tensor[:, :, past:].transpose(1, 2)[chose] for tensor in (mixed, own))
            assert torch.equal(new, expected)
            assert torch.equal(mixed[:, :, :past], own[:, :, :past])
    assert len(first[inputs.is_token].unique()) > 1


@pytest.mark.parametrize("for_tokens", [False, True])
@torch.no_grad()
def test_a_depth_gate_skips_at_the_lowest_cost(
    outlined: fx.GraphModule, model: PreTrainedModel, *, for_tokens: bool
) -> None:
    branches = {layer: branches_of(outlined, layer) for layer in _LAYERS}
    routers = {layer: _OfEachToken() if for_tokens else _OfTheFirstToken() for layer in _LAYERS}
    depth = {layer: _Score() for layer in _LAYERS}
    gm = choose_precision(outlined, branches, routers, for_tokens=for_tokens, depth_routers=depth)
    ungated = choose_precision(outlined, branches, routers, for_tokens=for_tokens)
    inputs = make_inputs(model, 2, 5, 3, "left", 0)
    threshold = gm.get_buffer("routing_threshold")
    threshold.fill_(0)
    torch.testing.assert_close(inputs.at_tokens(gm(*inputs.flat)[:1]), inputs.at_tokens(ungated(*inputs.flat)[:1]))
    threshold.fill_(2)
    logits, *rest = gm(*inputs.flat)
    assert not rest[-1][inputs.is_token].any()
    lowest = with_blocks(outlined, {layer: skip_block(branches[layer][4]) for layer in _LAYERS})(*inputs.flat)
    torch.testing.assert_close([logits, *rest[: -len(_LAYERS)]], list(lowest), rtol=0, atol=0)
    threshold.fill_(0.5)
    bits = gm(*inputs.flat)[-2][inputs.is_token]
    assert bool((bits == 0).any())
    assert bool((bits > 0).any())


@torch.no_grad()
def test_a_gated_block_changes_the_open_tokens_only(outlined: fx.GraphModule, model: PreTrainedModel) -> None:
    branches = {0: branches_of(outlined, 0)}
    gm = choose_precision(outlined, branches, {0: _OfTheFirstToken()}, depth_routers={0: _Score()})
    inputs = make_inputs(model, 2, 6, 3, "none", 0)
    block, seen = gm.get_submodule("blocks.0"), list[torch.Tensor]()
    assert isinstance(block, fx.GraphModule)
    block.register_forward_hook(lambda _, args, outputs: seen.extend([args[0], *outputs]))
    gm(*inputs.flat)
    before, after, *_, bits = seen
    is_open = before[..., 4] > 0
    assert torch.equal(bits > 0, is_open)
    assert torch.equal((before != after).any(-1), is_open)


def test_one_precision_for_tokens_needs_no_choice_either(outlined: fx.GraphModule, model: PreTrainedModel) -> None:
    branch = branches_of(outlined, 0)[4]
    gm = choose_precision(outlined, {0: {4: branch}}, {0: _OfTheFirstToken(1)}, for_tokens=True)
    block = gm.get_submodule("blocks.0")
    assert isinstance(block, fx.GraphModule)
    assert all(node.target is not torch.ops.higher_order.cond for node in block.graph.nodes)
    inputs = make_inputs(model, 2, 4, 3, "left", 0)
    with torch.no_grad():
        assert torch.equal(gm(*inputs.flat)[0], with_blocks(outlined, {0: branch})(*inputs.flat)[0])


def test_branches_stay_what_they_are(outlined: fx.GraphModule) -> None:
    block = outlined.get_submodule("blocks.0")
    assert isinstance(block, fx.GraphModule)
    before = block.code
    replaced = replace_weights(block, {}, "4")
    choose_precision(outlined, {0: {4: replaced, 8: block, 16: replaced}}, {0: _OfTheFirstToken()})
    assert block.code == before
