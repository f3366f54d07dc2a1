import pytest
import torch
from torch import fx, nn
from transformers import PreTrainedModel

from modcompile.passes import group_blocks, insert_depth_gates
from modcompile.passes.outlined_form import gated_layers
from modcompile.routers import SoftGate, StraightThroughGate
from tests.model_inputs import Padding, kernel_atol, make_inputs
from tests.passes.forced_routing import ConstantGate
from tests.routed_reference import Mix, run_reference
from tests.tiny_graphs import outlined_graph, random_adapters, random_routers

_LAYERS = (0, 2)
_SIZES = pytest.mark.parametrize(("batch", "length", "past_length"), [(1, 1, 0), (1, 7, 0), (2, 1, 5), (3, 4, 9)])
_PADDINGS = pytest.mark.parametrize("padding", ["none", "left", "right"])


@_PADDINGS
@_SIZES
def test_open_gates_equal_dense(
    model: PreTrainedModel, outlined: fx.GraphModule, batch: int, length: int, past_length: int, padding: Padding
) -> None:
    inputs = make_inputs(model, batch, length, past_length, padding)
    soft = insert_depth_gates(outlined, random_routers(_LAYERS), ConstantGate(1.0))
    with torch.no_grad():
        *actual, first, second = soft(*inputs.flat)
        torch.testing.assert_close(tuple(actual), outlined(*inputs.flat), rtol=0, atol=0)
    assert torch.equal(first, torch.ones(batch, length, 1))
    assert torch.equal(second, first)


@_PADDINGS
@_SIZES
@pytest.mark.parametrize("value", [0.0, 0.25])
def test_gates_mix_the_block_with_the_identity(
    model: PreTrainedModel,
    outlined: fx.GraphModule,
    value: float,
    batch: int,
    length: int,
    past_length: int,
    padding: Padding,
) -> None:
    def mix(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        return value * after + (1 - value) * before

    inputs = make_inputs(model, batch, length, past_length, padding)
    expected = run_reference(model, inputs, dict.fromkeys(_LAYERS, mix))
    soft = insert_depth_gates(outlined, random_routers(_LAYERS), ConstantGate(value))
    with torch.no_grad():
        actual = soft(*inputs.flat)[:-2]
    torch.testing.assert_close(actual, expected, rtol=0, atol=kernel_atol(model, length))


@pytest.mark.parametrize("gate", [SoftGate(), StraightThroughGate()], ids=["soft", "straight_through"])
def test_every_token_has_the_gate_of_its_own_hidden_state(
    model: PreTrainedModel, outlined: fx.GraphModule, gate: nn.Module
) -> None:
    routers = random_routers(_LAYERS)
    gates = []

    def mix(layer: int) -> Mix:
        def mixed(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
            gates.append(gate(routers[layer](before)))
            return gates[-1] * after + (1 - gates[-1]) * before

        return mixed

    inputs = make_inputs(model, 3, 4, 5, "left")
    expected = run_reference(model, inputs, {layer: mix(layer) for layer in _LAYERS})
    with torch.no_grad():
        actual = insert_depth_gates(outlined, routers, gate)(*inputs.flat)
    torch.testing.assert_close(actual, (*expected, *gates), rtol=0, atol=0)
    assert len(torch.cat(gates).unique()) > 1


@pytest.mark.parametrize(
    ("layers", "gates_per_decision", "read"),
    [
        ((0, 1, 2), 1, {0: 0, 1: 1, 2: 2}),
        ((0, 1, 2), 2, {0: 0, 1: 0, 2: 2}),
        ((1, 2), 2, {1: 1, 2: 1}),
        ((0, 2), 2, {0: 0, 2: 0}),
        ((0, 1, 2), 9, {0: 0, 1: 0, 2: 0}),
    ],
)
def test_gates_decided_at_once_read_what_the_first_of_them_reads(
    model: PreTrainedModel,
    outlined: fx.GraphModule,
    layers: tuple[int, ...],
    gates_per_decision: int,
    read: dict[int, int],
) -> None:
    """`read` is the layer in front of which each router stands, the last of a decision being on fewer gates."""
    routers = random_routers(layers)
    seen: dict[int, torch.Tensor] = {}
    gates = []

    def mix(layer: int) -> Mix:
        def mixed(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
            seen[layer] = before
            gates.append(routers[layer](seen[read[layer]]).sigmoid())
            return gates[-1] * after + (1 - gates[-1]) * before

        return mixed

    inputs = make_inputs(model, 3, 4, 5, "left")
    expected = run_reference(model, inputs, {layer: mix(layer) for layer in layers})
    soft = insert_depth_gates(outlined, routers, SoftGate(), gates_per_decision=gates_per_decision)
    with torch.no_grad():
        actual = soft(*inputs.flat)
    torch.testing.assert_close(actual, (*expected, *gates), rtol=0, atol=0)


@pytest.mark.parametrize("groups", [(), (range(2),)], ids=["alone", "in a group"])
def test_a_token_that_skips_a_layer_goes_through_its_adapter(
    model: PreTrainedModel, outlined: fx.GraphModule, groups: tuple[range, ...]
) -> None:
    """Each layer of a group has its own."""
    adapters = random_adapters((0, 1))
    routers = random_routers([0] if groups else [0, 1])
    gates: list[torch.Tensor] = []

    def mix(layer: int) -> Mix:
        def mixed(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
            if layer in routers:
                gates.append(routers[layer](before).sigmoid())
            return gates[-1] * after + (1 - gates[-1]) * adapters[layer](before)

        return mixed

    inputs = make_inputs(model, 3, 4, 5, "left")
    expected = run_reference(model, inputs, {layer: mix(layer) for layer in adapters})
    soft = insert_depth_gates(group_blocks(outlined, groups), routers, SoftGate(), adapters=adapters)
    with torch.no_grad():
        actual = soft(*inputs.flat)
    torch.testing.assert_close(actual, (*expected, *gates), rtol=0, atol=kernel_atol(model, 4))


def test_routes_the_given_layers_only(outlined: fx.GraphModule) -> None:
    soft = insert_depth_gates(outlined, random_routers([1]), SoftGate())
    assert gated_layers(soft) == [range(1, 2)]
    assert soft.get_submodule("blocks.0") is outlined.get_submodule("blocks.0")
    assert soft.get_submodule("blocks.2") is outlined.get_submodule("blocks.2")


def test_shares_block_and_router(outlined: fx.GraphModule) -> None:
    routers = random_routers(_LAYERS)
    soft = insert_depth_gates(outlined, routers, SoftGate())
    for layer in _LAYERS:
        assert soft.get_submodule(f"blocks.{layer}.router") is routers[layer]
        assert soft.get_submodule(f"blocks.{layer}.block.block") is outlined.get_submodule(f"blocks.{layer}")


@pytest.mark.parametrize("gate", [SoftGate(), StraightThroughGate()], ids=["soft", "straight_through"])
def test_gradient_reaches_the_routers_without_cache(architecture: str, model: PreTrainedModel, gate: nn.Module) -> None:
    routers = random_routers(_LAYERS)
    soft = insert_depth_gates(outlined_graph(architecture, use_cache=False), routers, gate)
    inputs = make_inputs(model, 2, 6, 0, "right")
    parameters = [parameter for router in routers.values() for parameter in router.parameters()]
    loss = soft(*inputs.tokens)[0].logsumexp(-1).sum()
    for gradient in torch.autograd.grad(loss, parameters):
        assert gradient.isfinite().all()
        assert gradient.abs().max() > 0
