import pytest
import torch
from hypothesis import given
from torch import fx
from transformers import PreTrainedModel

from modcompile.passes import fuse_operators, lower_gates
from modcompile.passes.add_unmasked_branch import add_unmasked_branch
from modcompile.passes.choose_precision import choose_precision
from modcompile.passes.compact_tokens import compact_tokens
from modcompile.passes.join_decisions import join_decisions
from modcompile.passes.nested_graphs import all_graphs
from modcompile.passes.outlined_form import gated_layers
from tests.model_inputs import make_inputs
from tests.passes.block_versions import branches_of
from tests.passes.forced_routing import ForcedRouter, force
from tests.passes.routing_cases import ROUTED_LAYERS, RoutingCase, routing_cases
from tests.tiny_graphs import hard_graph, outlined_graph, random_adapters, random_routers, shared_model

_GROUPS = (range(2), range(2, 3))


@pytest.fixture(scope="module")
def forced(architecture: str) -> fx.GraphModule:
    """A lowered graph whose routing masks the cases set, with a skip path."""
    routers = {layer: ForcedRouter() for layer in ROUTED_LAYERS}
    return lower_gates(hard_graph(architecture, routers, adapters=random_adapters(ROUTED_LAYERS)))


@pytest.fixture(scope="module")
def unmasked(forced: fx.GraphModule) -> fx.GraphModule:
    return add_unmasked_branch(forced)


@given(case=routing_cases())
@torch.no_grad()
def test_keeps_every_output(
    forced: fx.GraphModule, unmasked: fx.GraphModule, model: PreTrainedModel, case: RoutingCase
) -> None:
    """With all, none or some tokens open, which are then padding too; prompts and decode steps."""
    inputs = case.inputs(model)
    for gm in (forced, unmasked):
        force(gm, case.is_open())
    torch.testing.assert_close(unmasked(*inputs.flat), forced(*inputs.flat), rtol=0, atol=0)


def _taken(gm: fx.GraphModule, layers: str, run: tuple[torch.Tensor, ...]) -> list[str]:
    """Which branches of a block run in a call, by their names in it."""
    taken: list[str] = []
    block = gm.get_submodule(f"blocks.{layers}")
    names = ("then_branch", "else_branch.then_branch", "else_branch.else_branch")
    handles = [
        block.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: taken.append(name)) for name in names
    ]
    gm(*run)
    for handle in handles:
        handle.remove()
    return taken


@pytest.mark.parametrize(
    ("tokens", "branch"),
    [
        pytest.param([[True, True, True], [True, True, True]], "then_branch", id="all"),
        pytest.param([[True, True, True], [False, True, True]], "else_branch.then_branch", id="all but one"),
        pytest.param([[False, False, False], [False, False, True]], "else_branch.then_branch", id="one"),
        pytest.param([[False, False, False], [False, False, False]], "else_branch.else_branch", id="none"),
    ],
)
@torch.no_grad()
def test_executes_without_masks_where_all_tokens_are_open(
    unmasked: fx.GraphModule, model: PreTrainedModel, tokens: list[list[bool]], branch: str
) -> None:
    force(unmasked, dict.fromkeys(ROUTED_LAYERS, torch.tensor(tokens).unsqueeze(-1)))
    assert _taken(unmasked, "2", make_inputs(model, 2, 3, 0).flat) == [branch]


def test_has_neither_masks_nor_adapters_there(unmasked: fx.GraphModule) -> None:
    for layer in ROUTED_LAYERS:
        branch = unmasked.get_submodule(f"blocks.{layer}.then_branch")
        assert not _uses_masks(branch)
        assert not [name for name, _ in branch.named_modules() if "skip" in name]
        assert _uses_masks(unmasked.get_submodule(f"blocks.{layer}.else_branch.then_branch"))


def _uses_masks(module: torch.nn.Module) -> bool:
    return any(each.graph.find_nodes(op="call_function", target=torch.where) for each in all_graphs(module))


def test_shares_all_parameters(forced: fx.GraphModule, unmasked: fx.GraphModule) -> None:
    assert {id(each) for each in unmasked.parameters()} == {id(each) for each in forced.parameters()}
    for layer in ROUTED_LAYERS:
        for branch in ("then_branch", "else_branch"):
            shared = forced.get_submodule(f"blocks.{layer}.{branch}")
            assert unmasked.get_submodule(f"blocks.{layer}.else_branch.{branch}") is shared


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("gates_per_decision", [1, 2])
@torch.no_grad()
def test_of_groups_and_with_the_passes_behind_it(gates_per_decision: int, compact: bool) -> None:
    hard = hard_graph("llama", random_routers((0, 2)), _GROUPS, gates_per_decision=gates_per_decision)
    lowered = lower_gates(hard)
    gm = fuse_operators(join_decisions(add_unmasked_branch(lowered)))
    if compact:
        gm = compact_tokens(gm)
    assert gated_layers(gm) == list(_GROUPS)
    seen = set[str]()
    for thresholds in ([0.0, 0.0], [0.0, 2.0], [0.5, 0.5], [2.0, 0.0], [2.0, 2.0], [1e-6, 1e-6]):
        for each in (lowered, gm):
            each.get_buffer("routing_threshold").copy_(torch.tensor(thresholds))
        for length, past_length in ((5, 0), (1, 4)):
            inputs = make_inputs(shared_model("llama"), 3, length, past_length, "left")
            expected, actual = (inputs.at_tokens(each(*inputs.flat)) for each in (lowered, gm))
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
            seen.update(_taken(gm, "0-1", inputs.flat))
    assert seen == {"then_branch", "else_branch.then_branch", "else_branch.else_branch"}


def test_leaves_blocks_that_choose_their_bits() -> None:
    outlined = outlined_graph("llama")
    branches = {layer: branches_of(outlined, layer) for layer in (0, 2)}
    routers = {layer: torch.nn.Identity() for layer in branches}
    gm = choose_precision(outlined, branches, routers, depth_routers=random_routers(branches))
    after = add_unmasked_branch(gm)
    assert after.code == gm.code
    assert all(after.get_submodule(f"blocks.{layer}") is gm.get_submodule(f"blocks.{layer}") for layer in branches)
