import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx, nn
from transformers import PreTrainedModel

from modcompile.passes.choose_precision import DecidePrecision, choose_precision
from modcompile.passes.replace_weights import replace_weights
from tests.model_inputs import Padding, make_inputs
from tests.passes.block_versions import branches_of, with_blocks

_LAYERS = (0, 2)


class _OfTheFirstToken(nn.Module):
    """Logits `[B, P]` that the first token of a row decides, whatever else there is."""

    def __init__(self, num_precisions: int = 3) -> None:
        super().__init__()
        self.num_precisions = num_precisions

    def forward(self, hidden: torch.Tensor, token_mask: torch.Tensor) -> torch.Tensor:
        return hidden[:, 0, : self.num_precisions] * 10


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
def test_is_the_graph_with_the_chosenbranches_of(
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
        if name.split(".")[-1] in ("branch_0", "branch_1", "take_2", "keep_2")
    ]
    inputs = make_inputs(model, 2, 4, 0, "none", 0)
    for choice, expected in enumerate((["branch_0", "keep_2"], ["branch_1", "keep_2"], ["branch_1", "take_2"])):
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


def _decide(logits: list[list[float]], mask: list[list[bool]], bias: list[float]) -> tuple[list[bool], torch.Tensor]:
    hidden = torch.tensor(logits).unsqueeze(1).repeat(1, len(mask[0]), 1) / 10
    *chosen, choice = DecidePrecision(_OfTheFirstToken(), (4, 8, 16))(
        hidden, torch.tensor(mask).unsqueeze(-1), torch.tensor(bias)
    )
    return [bool(value) for value in chosen], choice


@pytest.mark.parametrize(
    ("logits", "mask", "bias", "expected"),
    [
        pytest.param([[3, 2, 1]], [[True]], [0, 0, 0], 0, id="the largest logit"),
        pytest.param([[3, 2, 1], [1, 2, 0]], [[True], [True]], [0, 0, 0], 1, id="the highest precision of any row"),
        pytest.param([[3, 2, 1], [0, 1, 2]], [[True], [False]], [0, 0, 0], 0, id="padding asks for nothing"),
        pytest.param([[3, 2, 1]], [[True]], [0, 0, 5], 2, id="a bias shifts"),
        pytest.param([[3, 2, 1]], [[True]], [0, torch.inf, 0], 1, id="a bias forces"),
    ],
)
def test_decides(logits: list[list[float]], mask: list[list[bool]], bias: list[float], expected: int) -> None:
    chosen, choice = _decide(logits, mask, bias)
    assert chosen == [index == expected for index in range(3)]
    assert choice.tolist() == [[(4, 8, 16)[expected]]] * len(logits)


def test_branches_stay_what_they_are(outlined: fx.GraphModule) -> None:
    block = outlined.get_submodule("blocks.0")
    assert isinstance(block, fx.GraphModule)
    before = block.code
    replaced = replace_weights(block, {}, "4")
    choose_precision(outlined, {0: {4: replaced, 8: block, 16: replaced}}, {0: _OfTheFirstToken()})
    assert block.code == before
