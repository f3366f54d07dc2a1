import torch
from torch import fx, nn

from modcompile.passes import lower_gates
from modcompile.passes.nested_graphs import all_graphs, map_graphs
from modcompile.passes.outlined_form import copy_graph
from tests.model_inputs import make_inputs
from tests.tiny_graphs import hard_graph, random_routers, shared_model
from tests.tiny_models import tiny_model


def _lowered() -> fx.GraphModule:
    return lower_gates(hard_graph("llama", random_routers([0, 2])))


def test_reaches_blocks_branches_and_what_these_call_once_each() -> None:
    gm = _lowered()
    seen: list[fx.GraphModule] = []

    def kept(called: fx.GraphModule) -> fx.GraphModule:
        seen.append(called)
        return called

    mapped = map_graphs(gm, kept)
    assert seen[-1] is mapped
    names = {name for name, module in mapped.named_modules() if isinstance(module, fx.GraphModule)}
    assert {"", "prologue", "epilogue", "blocks.1", "blocks.0.then_branch", "blocks.2.else_branch"} <= names
    assert names == {name for name, module in gm.named_modules() if isinstance(module, fx.GraphModule)}
    assert len(seen) == len(names) == len(list(all_graphs(gm)))


@torch.no_grad()
def test_what_is_not_changed_computes_the_same_on_the_same_parameters() -> None:
    gm = _lowered()
    mapped = map_graphs(gm, lambda called: called)
    inputs = make_inputs(shared_model("llama"), 2, 3, 4, "left")
    for actual, expected in zip(mapped(*inputs.flat), gm(*inputs.flat), strict=True):
        assert torch.equal(actual, expected)
    assert {name: id(parameter) for name, parameter in mapped.named_parameters()} == {
        name: id(parameter) for name, parameter in gm.named_parameters()
    }


def _with_relu(called: fx.GraphModule) -> fx.GraphModule:
    graph, outputs = copy_graph(called)
    graph.output(outputs)
    for node in graph.nodes:
        if node.target is torch.ops.aten.silu.default:
            node.target = torch.ops.aten.relu.default
    return fx.GraphModule(called, graph)


@torch.no_grad()
def test_what_is_changed_inside_of_branches_is_what_they_compute() -> None:
    gm = _lowered()
    gm.get_buffer("routing_threshold").zero_()
    inputs = make_inputs(shared_model("llama"), 2, 3, 0, "none")
    before = gm(*inputs.flat)
    changed = map_graphs(gm, _with_relu)
    other = tiny_model("llama")
    for module in other.modules():
        if hasattr(module, "act_fn"):
            module.act_fn = nn.ReLU()
    torch.testing.assert_close(changed(*inputs.flat)[0], other(inputs.input_ids).logits)
    assert not torch.allclose(changed(*inputs.flat)[0], before[0], atol=1e-3)
    assert all(torch.equal(one, other) for one, other in zip(gm(*inputs.flat), before, strict=True))
