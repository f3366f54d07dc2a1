from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from modcompile.dense_layers import DenseLayers
from modcompile.tracing import find_layers
from tests.tiny_routed import tiny_base

IDS = torch.tensor([[5, 9, 200, 17], [8, 3, 77, 0]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])


@torch.no_grad()
def test_states_are_those_between_the_layers() -> None:
    base = tiny_base()
    logits, states = DenseLayers(base, "block").run(IDS, MASK)
    expected = base(IDS, MASK, output_hidden_states=True)
    is_token = MASK == 1  # padding may be at any position
    torch.testing.assert_close(logits[is_token], expected.logits[is_token], rtol=0, atol=0)
    assert len(states) == 4
    last = base.model.norm(states[-1])  # as it is told there
    for state, wanted in zip([*states[:-1], last], expected.hidden_states, strict=True):
        torch.testing.assert_close(state[is_token], wanted[is_token], rtol=0, atol=0)


@torch.no_grad()
def test_of_any_architecture(model: PreTrainedModel) -> None:
    """What its own layers are called with and return, as hooks on them see it."""
    seen: list[torch.Tensor] = []

    def listen(_: object, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor], output: Any) -> None:
        if not seen:
            seen.append(args[0] if args else kwargs["hidden_states"])
        seen.append(output[0] if isinstance(output, tuple) else output)

    handles = [layer.register_forward_hook(listen, with_kwargs=True) for layer in find_layers(model)]
    expected = model(input_ids=IDS % 60, attention_mask=MASK).logits
    for handle in handles:
        handle.remove()
    logits, states = DenseLayers(model, "block").run(IDS % 60, MASK)
    torch.testing.assert_close(logits[MASK == 1], expected[MASK == 1], rtol=0, atol=1e-6)
    for state, wanted in zip(states, seen, strict=True):
        torch.testing.assert_close(state[MASK == 1], wanted[MASK == 1], rtol=0, atol=1e-6)


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
    is_token = MASK == 1
    found = torch.autograd.grad(cross_entropy(logits[is_token], IDS[is_token]), states)
    embedded = base.get_input_embeddings()(IDS).detach().requires_grad_()
    expected = base(inputs_embeds=embedded, attention_mask=MASK, output_hidden_states=True)
    loss = cross_entropy(expected.logits[is_token], IDS[is_token])
    wanted = torch.autograd.grad(loss, expected.hidden_states[:-1])
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
