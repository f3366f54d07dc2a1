import pytest
import torch
from torch import fx
from transformers import PreTrainedModel

from modcompile.passes import harden_gates
from modcompile.passes.fold_gates import fold_gates
from modcompile.passes.outlined_form import block_calls, gated_layers
from modcompile.tracing import find_layers
from tests.model_inputs import make_inputs, run_model
from tests.passes.routing_cases import ROUTED_LAYERS
from tests.routed_reference import run_reference, skip
from tests.tiny_graphs import hard_graph, random_adapters, random_routers, shared_model
from tests.tiny_routed import tiny_grouped

FIRST, LAST = (range(layer, layer + 1) for layer in ROUTED_LAYERS)


@pytest.fixture(scope="module")
def hard(architecture: str) -> fx.GraphModule:
    return hard_graph(architecture, random_routers(ROUTED_LAYERS))


@pytest.mark.parametrize(
    ("executed", "skipped", "thresholds"),
    [
        ([FIRST], [], [0.0, 0.4]),
        ([LAST], [], [0.4, 0.0]),
        ([], [FIRST], [1.0, 0.4]),
        ([], [LAST], [0.4, 1.0]),
        ([FIRST, LAST], [], [0.0, 0.0]),
        ([LAST], [FIRST], [1.0, 0.0]),
    ],
)
@pytest.mark.parametrize("padding", ["left", "right"])
@torch.no_grad()
def test_does_what_thresholds_make_of_these_gates(
    hard: fx.GraphModule,
    model: PreTrainedModel,
    executed: list[range],
    skipped: list[range],
    thresholds: list[float],
    padding: str,
) -> None:
    inputs = make_inputs(model, 2, 5, 3, "left" if padding == "left" else "right")
    hard.get_buffer("routing_threshold").copy_(torch.tensor(thresholds))
    folded = fold_gates(hard, executed, skipped)
    left = [index for index, layers in enumerate((FIRST, LAST)) if layers not in (*executed, *skipped)]
    assert gated_layers(folded) == [(FIRST, LAST)[index] for index in left]
    *expected, first, last = hard(*inputs.flat)
    wanted = (*expected, *((first, last)[index] for index in left))
    torch.testing.assert_close(folded(*inputs.flat), wanted, rtol=0, atol=0)
    buffers = dict(folded.named_buffers())
    if left:
        assert buffers["routing_threshold"].tolist() == pytest.approx([thresholds[index] for index in left])
    else:
        assert "routing_threshold" not in buffers


@torch.no_grad()
def test_is_the_dense_model_with_every_gate_open(hard: fx.GraphModule, model: PreTrainedModel) -> None:
    inputs = make_inputs(model, 2, 5, 3, "none")
    folded = fold_gates(hard, [FIRST, LAST], [])
    torch.testing.assert_close(folded(*inputs.flat), run_model(model, inputs))
    assert not {name for name, _ in folded.named_modules() if "decide" in name or "routing" in name}


@torch.no_grad()
def test_skips_a_layer_for_good(hard: fx.GraphModule, model: PreTrainedModel) -> None:
    inputs = make_inputs(model, 2, 5, 3, "none")
    folded = fold_gates(hard, [FIRST], [LAST])
    torch.testing.assert_close(folded(*inputs.flat), run_reference(model, inputs, {2: skip}))
    held = sum(parameter.numel() for parameter in folded.get_submodule("blocks.2").parameters())
    assert held < sum(parameter.numel() for parameter in find_layers(model)[2].parameters()) / 2


@torch.no_grad()
def test_a_layer_that_is_skipped_for_good_keeps_its_adapter(architecture: str, model: PreTrainedModel) -> None:
    adapters = random_adapters(ROUTED_LAYERS)
    inputs = make_inputs(model, 2, 5, 3, "none")
    hard = hard_graph(architecture, random_routers(ROUTED_LAYERS), adapters=adapters)
    folded = fold_gates(hard, [FIRST], [LAST])
    expected = run_reference(model, inputs, {2: lambda before, _: adapters[2](before)})
    torch.testing.assert_close(folded(*inputs.flat), expected)
    assert not [name for name, _ in folded.named_parameters() if name.startswith("blocks.0.skip")]


@pytest.mark.parametrize("layer", range(3))
@pytest.mark.parametrize("folds", ["executed", "skipped"])
@torch.no_grad()
def test_leaves_what_the_others_are_decided_from(layer: int, folds: str) -> None:
    """Of three gates that are decided at once, whichever is folded."""
    hard = hard_graph("llama", random_routers(range(3)), gates_per_decision=3)
    thresholds = [0.4, 0.5, 0.6]
    thresholds[layer] = 0.0 if folds == "executed" else 1.0
    hard.get_buffer("routing_threshold").copy_(torch.tensor(thresholds))
    inputs = make_inputs(shared_model("llama"), 2, 5, 3, "left")
    gate = [range(layer, layer + 1)]
    folded = fold_gates(hard, gate, []) if folds == "executed" else fold_gates(hard, [], gate)
    *expected, first, second, third = hard(*inputs.flat)
    masks = [mask for index, mask in enumerate((first, second, third)) if index != layer]
    assert all(0 < mask.sum() < inputs.is_token.sum() for mask in masks)
    torch.testing.assert_close(folded(*inputs.flat), (*expected, *masks), rtol=0, atol=0)


@pytest.mark.parametrize("folds", ["executed", "skipped"])
@torch.no_grad()
def test_takes_a_group_apart(folds: str) -> None:
    routed = tiny_grouped("straight_through")
    hard = harden_gates(routed.graph)
    hard.get_buffer("routing_threshold").copy_(torch.tensor([0.0 if folds == "executed" else 1.0, 0.5]))
    inputs = make_inputs(routed.base, 2, 5, 3, "left")
    group = routed.gated_layers[:1]
    folded = fold_gates(hard, group, []) if folds == "executed" else fold_gates(hard, [], group)
    assert [str(call.target) for call in block_calls(folded.graph)] == ["blocks.0", "blocks.1", "blocks.2"]
    *expected, _, last = hard(*inputs.flat)
    torch.testing.assert_close(folded(*inputs.flat), (*expected, last), rtol=0, atol=0)
