import operator

import pytest
from torch import fx, nn

from modcompile.passes import harden_gates, insert_depth_gates, lower_gates
from modcompile.passes.group_blocks import group_blocks
from modcompile.passes.outlined_form import (
    block_calls,
    called_modules,
    copy_graph,
    gated_layers,
    inner_block,
    is_group,
    results,
    routed_calls,
)
from modcompile.routers import SoftGate
from tests.tiny_graphs import outlined_graph, random_routers


@pytest.fixture(scope="module")
def forms() -> dict[str, fx.GraphModule]:
    dense = outlined_graph("llama")
    soft = insert_depth_gates(dense, random_routers([0, 2]), SoftGate())
    hard = harden_gates(soft)
    return {"dense": dense, "soft": soft, "hard": hard, "lowered": lower_gates(hard)}


_FORMS = pytest.mark.parametrize("form", ["dense", "soft", "hard", "lowered"])


@_FORMS
def test_block_calls_are_those_of_all_layers_in_order(forms: dict[str, fx.GraphModule], form: str) -> None:
    assert [call.target for call in block_calls(forms[form].graph)] == ["blocks.0", "blocks.1", "blocks.2"]


@_FORMS
def test_gated_layers_are_those_with_a_router(forms: dict[str, fx.GraphModule], form: str) -> None:
    assert gated_layers(forms[form]) == ([] if form == "dense" else [range(1), range(2, 3)])


@_FORMS
def test_a_block_returns_hidden_state_cache_and_mask(forms: dict[str, fx.GraphModule], form: str) -> None:
    for call in block_calls(forms[form].graph):
        routed = call in routed_calls(forms[form])
        assert [node.args for node in results(call)] == [(call, index) for index in range(4 if routed else 3)]


@_FORMS
def test_returns_logits_then_cache_then_one_value_for_each_gate(forms: dict[str, fx.GraphModule], form: str) -> None:
    gm = forms[form]
    _, outputs = copy_graph(gm)
    assert len(outputs) == 1 + 2 * 3 + len(gated_layers(gm))


def test_routed_calls_are_nodes_of_the_given_graph(forms: dict[str, fx.GraphModule]) -> None:
    graph, _ = copy_graph(forms["soft"])
    assert all(call.graph is graph for call in routed_calls(forms["soft"], graph))


def test_results_are_in_the_order_of_what_the_call_returns() -> None:
    graph = fx.Graph()
    call = graph.call_module("blocks.0", (graph.placeholder("x"),))
    nodes = [graph.call_function(operator.getitem, (call, index)) for index in (2, 10, 0)]
    assert results(call) == [nodes[2], nodes[0], nodes[1]]


def test_called_modules_are_shared_and_named_as_called(forms: dict[str, fx.GraphModule]) -> None:
    dense = forms["dense"]
    modules = called_modules(dense)
    assert set(modules) == {"prologue", "blocks.0", "blocks.1", "blocks.2", "epilogue"}
    assert all(modules[name] is dense.get_submodule(name) for name in modules)


def test_a_group_is_what_only_calls_its_members(forms: dict[str, fx.GraphModule]) -> None:
    dense = forms["dense"]
    assert is_group(group_blocks(dense, [range(1, 3)]).get_submodule("blocks.1-2"))
    assert not is_group(dense)  # it calls prologue, blocks and epilogue, which are no members
    assert not any(is_group(module) for module in called_modules(dense).values())
    assert not is_group(forms["lowered"].get_submodule("blocks.0"))
    assert not is_group(nn.Sequential(nn.Linear(2, 2)))


@pytest.mark.parametrize("layer", [0, 2])
def test_inner_block_is_the_one_that_the_gate_changes(forms: dict[str, fx.GraphModule], layer: int) -> None:
    for form in ("soft", "hard"):
        block = forms[form].get_submodule(f"blocks.{layer}.block")
        assert isinstance(block, fx.GraphModule)
        assert inner_block(block) is forms["dense"].get_submodule(f"blocks.{layer}")


def test_copied_graph_has_no_output_yet(forms: dict[str, fx.GraphModule]) -> None:
    graph, outputs = copy_graph(forms["dense"])
    assert not graph.find_nodes(op="output")
    graph.output(outputs)
    assert fx.GraphModule(forms["dense"], graph).code == forms["dense"].code
