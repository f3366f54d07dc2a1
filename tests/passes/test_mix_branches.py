import torch
from torch import fx

from modcompile.passes.mix_branches import CombineCache, SelectByIndex, WeightedSum, mix_branches
from modcompile.passes.outlined_form import block_calls
from tests.model_inputs import make_inputs
from tests.passes.block_versions import branches_of
from tests.tiny_graphs import shared_model
from tests.tiny_models import HIDDEN_SIZE

_VALUES = tuple(torch.full((2, 3, 4), float(index)) for index in range(3))
_TOKENS, _PAST = 5, 4


def test_selects_by_index() -> None:
    selection = torch.tensor([[0, 1, 2], [2, 2, 0]]).unsqueeze(-1)
    assert torch.equal(SelectByIndex()(selection, *_VALUES), selection.float().expand(2, 3, 4))


def test_sums_by_weight() -> None:
    weights = torch.tensor([[[0.5, 0.25, 0.25]], [[0.0, 0.0, 1.0]]])
    assert WeightedSum()(weights, *_VALUES)[:, 0, 0].tolist() == [0.75, 2]
    assert WeightedSum()(weights.expand(2, 3, 3), *_VALUES)[:, :, 0].tolist() == [[0.75] * 3, [2] * 3]


def test_combines_new_keys_and_keeps_the_past() -> None:
    past = torch.randn(2, 1, 4, 8, generator=torch.Generator().manual_seed(0))
    presents = [torch.cat([past, torch.full((2, 1, 3, 8), float(index))], 2) for index in range(3)]
    selection = torch.tensor([[0, 1, 2], [2, 2, 0]]).unsqueeze(-1)
    combined = CombineCache(SelectByIndex())(torch.zeros(2, 3, 4), selection, *presents)
    assert torch.equal(combined[:, :, :4], past)
    assert torch.equal(combined[:, 0, 4:, 0], selection.squeeze(-1).float())


def _block_inputs(outlined: fx.GraphModule, architecture: str, seed: int = 0) -> list[torch.Tensor]:
    """What the first block is called with."""
    inputs = make_inputs(shared_model(architecture), 2, _TOKENS, _PAST, "left", seed)
    name, seen = str(block_calls(outlined.graph)[0].target), list[torch.Tensor]()
    hook = outlined.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.extend(args))
    outlined(*inputs.flat)
    hook.remove()
    return seen


@torch.no_grad()
def test_where_all_select_one_it_is_that_one(outlined: fx.GraphModule, architecture: str) -> None:
    branches = list(branches_of(outlined, 0).values())
    inputs = _block_inputs(outlined, architecture)
    selecting, weighing = (mix_branches(branches, combine()) for combine in (SelectByIndex, WeightedSum))
    for index, branch in enumerate(branches):
        expected = list(branch(*inputs))
        actual = list(selecting(*inputs, torch.full((2, _TOKENS, 1), index)))
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
        weights = torch.nn.functional.one_hot(torch.full((2, _TOKENS), index), len(branches)).float()
        torch.testing.assert_close(list(weighing(*inputs, weights)), expected, rtol=0, atol=1e-6)


@torch.no_grad()
def test_a_token_attends_to_what_the_others_selected(outlined: fx.GraphModule, architecture: str) -> None:
    branches = list(branches_of(outlined, 0).values())
    inputs = _block_inputs(outlined, architecture)
    gm = mix_branches(branches, SelectByIndex())
    last = torch.zeros(2, _TOKENS, 1, dtype=torch.long)
    others = last.clone()
    others[:, :-1] = 1
    hidden, key, _ = gm(*inputs, others)
    alone, own_key, _ = gm(*inputs, last)
    assert torch.equal(key[:, :, -1], own_key[:, :, -1])
    assert not torch.allclose(key[:, :, _PAST:-1], own_key[:, :, _PAST:-1])
    assert hidden.shape == (2, _TOKENS, HIDDEN_SIZE)
    assert not torch.allclose(hidden[:, -1], alone[:, -1])
