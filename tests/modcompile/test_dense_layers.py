import pytest
import torch
from torch.nn.functional import cross_entropy

from modcompile.dense_layers import DenseLayers
from tests.tiny_routed import tiny_base

IDS = torch.tensor([[5, 9, 200, 17], [8, 3, 77, 0]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])


@torch.no_grad()
def test_states_are_those_between_the_layers() -> None:
    base = tiny_base()
    logits, states = DenseLayers(base, "block").run(IDS, MASK)
    expected = base(IDS, MASK, output_hidden_states=True)
    torch.testing.assert_close(logits, expected.logits, rtol=0, atol=0)
    assert len(states) == 4
    for state, wanted in zip(states[:-1], expected.hidden_states, strict=False):  # the last one is normed there
        torch.testing.assert_close(state, wanted, rtol=0, atol=0)
    torch.testing.assert_close(base.model.norm(states[-1]), expected.hidden_states[-1], rtol=0, atol=0)


@torch.no_grad()
def test_of_halves_there_is_one_more_in_every_layer() -> None:
    base = tiny_base()
    _, whole = DenseLayers(base, "block").run(IDS, MASK)
    _, halves = DenseLayers(base, "attn").run(IDS, MASK)
    assert len(halves) == 7
    for state, wanted in zip(halves[::2], whole, strict=True):
        torch.testing.assert_close(state, wanted, rtol=0, atol=0)


def test_gradients_are_those_of_the_base() -> None:
    base = tiny_base()
    logits, states = DenseLayers(base, "block").run(IDS, MASK)
    found = torch.autograd.grad(cross_entropy(logits.flatten(0, 1), IDS.flatten()), states)
    embedded = base.get_input_embeddings()(IDS).detach().requires_grad_()
    expected = base(inputs_embeds=embedded, attention_mask=MASK, output_hidden_states=True)
    wanted = torch.autograd.grad(
        cross_entropy(expected.logits.flatten(0, 1), IDS.flatten()), expected.hidden_states[:-1]
    )
    for gradient, other in zip(found[:-1], wanted, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-7)
    assert all(gradient.abs().max() > 0 for gradient in found)


def test_nothing_listens_afterwards() -> None:
    layers = DenseLayers(tiny_base(), "block")
    with torch.no_grad():
        _, states = layers.run(IDS, MASK)
        layers.run(IDS, MASK)
    assert len(states) == 4
    with pytest.raises(RuntimeError, match="does not require grad"):
        states[0].sum().backward()
