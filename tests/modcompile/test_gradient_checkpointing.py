from collections.abc import Iterator

import pytest
import torch
from torch import fx

from modcompile.gradient_checkpointing import checkpoint_blocks
from modcompile.modeling import RoutedForCausalLM
from modcompile.passes.outlined_form import block_calls
from tests.tiny_routed import tiny_routed

_INPUT_IDS = torch.randint(300, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def routed() -> Iterator[RoutedForCausalLM]:
    model = tiny_routed("straight_through", use_cache=False)
    model.set_router_mode(None)
    yield model
    model.gradient_checkpointing_disable()
    model.zero_grad()


def _gradients(model: RoutedForCausalLM) -> list[torch.Tensor]:
    model.zero_grad()
    model(_INPUT_IDS, labels=_INPUT_IDS).loss.backward()
    return [parameter.grad.clone() for parameter in model.router_parameters() if parameter.grad is not None]


def _kept(model: RoutedForCausalLM) -> int:
    """Numbers that a forward pass keeps for the backward pass, parameters included."""
    sizes: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(_INPUT_IDS, labels=_INPUT_IDS)
    return sum(sizes)


def test_gives_the_same_gradients(routed: RoutedForCausalLM) -> None:
    expected = _gradients(routed)
    routed.gradient_checkpointing_enable()
    torch.testing.assert_close(_gradients(routed), expected, rtol=0, atol=0)


def test_keeps_less_for_the_backward_pass(routed: RoutedForCausalLM) -> None:
    plain = _kept(routed)
    routed.gradient_checkpointing_enable()
    assert _kept(routed) < plain / 2
    routed.gradient_checkpointing_disable()
    assert _kept(routed) == plain


def test_leaves_names_and_graph_as_they_are(routed: RoutedForCausalLM) -> None:
    names, code = list(routed.state_dict()), routed.graph.code
    routed.gradient_checkpointing_enable()
    assert list(routed.state_dict()) == names
    assert routed.graph.code == code


def test_may_be_enabled_twice(routed: RoutedForCausalLM) -> None:
    expected = _gradients(routed)
    for _ in range(2):
        checkpoint_blocks(routed.graph, enabled=True)
    torch.testing.assert_close(_gradients(routed), expected, rtol=0, atol=0)
    checkpoint_blocks(routed.graph, enabled=False)
    blocks = [routed.graph.get_submodule(str(call.target)) for call in block_calls(routed.graph.graph)]
    assert all(isinstance(block, fx.GraphModule) and "forward" not in vars(block) for block in blocks)
