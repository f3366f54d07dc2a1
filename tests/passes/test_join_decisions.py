from collections.abc import Mapping

import pytest
import torch
from torch import fx, nn

from modcompile.passes import choose_precision, lower_gates
from modcompile.passes.fold_gates import fold_gates
from modcompile.passes.join_decisions import join_decisions
from modcompile.passes.outlined_form import gated_layers
from tests.model_inputs import Padding, make_inputs
from tests.passes.block_versions import branches_of
from tests.tiny_graphs import hard_graph, outlined_graph, random_routers, shared_model

_LAYERS = range(3)
_EACH = [range(layer, layer + 1) for layer in _LAYERS]


def _lowered(routers: Mapping[int, nn.Module], gates_per_decision: int) -> fx.GraphModule:
    return lower_gates(hard_graph("llama", routers, gates_per_decision=gates_per_decision))


def _decisions(gm: fx.GraphModule) -> list[str]:
    """What decides: for several gates, or within a block for one."""
    return [name for name, _ in gm.named_modules() if name.startswith("decisions.") and name.count(".") == 1] + [
        name for name, _ in gm.named_modules() if name.endswith(".decide")
    ]


@pytest.mark.parametrize("gates_per_decision", [2, 3])
@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("router_hidden_size", [8, 0])
@torch.no_grad()
def test_keeps_every_output(gates_per_decision: int, padding: Padding, router_hidden_size: int) -> None:
    gm = _lowered(random_routers(_LAYERS, router_hidden_size=router_hidden_size), gates_per_decision)
    joined, seen = join_decisions(gm), set[bool]()
    for thresholds in ([0.5, 0.4, 0.6], [0.0, 0.5, 2.0], [2.0, 0.0, 0.5], [0.0] * 3, [2.0] * 3):
        for each in (gm, joined):
            each.get_buffer("routing_threshold").copy_(torch.tensor(thresholds))
        for length, past_length in ((5, 0), (1, 4)):
            inputs = make_inputs(shared_model("llama"), 3, length, past_length, padding)
            expected, actual = gm(*inputs.flat), joined(*inputs.flat)
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
            seen |= set(torch.cat(expected[-3:]).flatten().tolist())
    assert seen == {True, False}


@pytest.mark.parametrize(
    ("gates_per_decision", "left"),
    [(2, ["decisions.0,1", "blocks.2.decide"]), (3, ["decisions.0,1,2"]), (9, ["decisions.0,1,2"])],
)
def test_decides_once_for_those_that_read_the_same(gates_per_decision: int, left: list[str]) -> None:
    joined = join_decisions(_lowered(random_routers(_LAYERS), gates_per_decision))
    assert _decisions(joined) == left
    assert gated_layers(joined) == _EACH


@pytest.mark.parametrize(
    "forced", [[True, False, False], [False, True, False], [False, False, True], [False, True, True]], ids=str
)
@torch.no_grad()
def test_executes_the_blocks_that_a_token_needs(forced: list[bool]) -> None:
    joined = join_decisions(_lowered(random_routers(_LAYERS), 3))
    joined.get_buffer("routing_threshold").copy_(torch.where(torch.tensor(forced), 0.0, 2.0))
    executed = []
    for layer in _LAYERS:
        branch = joined.get_submodule(f"blocks.{layer}.then_branch")
        branch.register_forward_pre_hook(lambda *_, layer=layer: executed.append(layer))
    joined(*make_inputs(shared_model("llama"), 2, 3, 0).flat)
    assert executed == [layer for layer in _LAYERS if forced[layer]]


@pytest.mark.parametrize("layer", _LAYERS)
@torch.no_grad()
def test_joins_what_folding_leaves(layer: int) -> None:
    hard = hard_graph("llama", random_routers(_LAYERS), gates_per_decision=3)
    gm = lower_gates(fold_gates(hard, [], [_EACH[layer]]))
    joined = join_decisions(gm)
    left = [other for other in _LAYERS if other != layer]
    assert _decisions(joined) == [f"decisions.{left[0]},{left[1]}"]
    assert gated_layers(joined) == [_EACH[other] for other in left]
    inputs = make_inputs(shared_model("llama"), 3, 5, 2, "left")
    torch.testing.assert_close(joined(*inputs.flat), gm(*inputs.flat), rtol=0, atol=1e-5)


def test_leaves_gates_that_read_each_their_own() -> None:
    gm = _lowered(random_routers(_LAYERS), 1)
    assert join_decisions(gm) is gm


def test_leaves_routers_that_it_does_not_know() -> None:
    known, unknown = random_routers(_LAYERS), nn.Linear(shared_model("llama").config.hidden_size, 1)
    gm = _lowered(known | {0: unknown}, 2)
    assert join_decisions(gm) is gm


def test_leaves_blocks_that_choose_their_bits() -> None:
    outlined = outlined_graph("llama")
    branches = {layer: branches_of(outlined, layer) for layer in (0, 2)}
    routers = {layer: nn.Identity() for layer in branches}
    gm = choose_precision(outlined, branches, routers, depth_routers=random_routers(branches))
    assert join_decisions(gm) is gm


@torch.no_grad()
def test_shares_branches_and_leaves_the_graph_that_it_was_given() -> None:
    gm = _lowered(random_routers(_LAYERS), 3)
    inputs = make_inputs(shared_model("llama"), 2, 3, 0)
    before = gm(*inputs.flat)
    joined = join_decisions(gm)
    for layer in _LAYERS:
        for branch in ("then_branch", "else_branch"):
            name = f"blocks.{layer}.{branch}"
            assert joined.get_submodule(name) is gm.get_submodule(name)
    torch.testing.assert_close(gm(*inputs.flat), before, rtol=0, atol=0)
