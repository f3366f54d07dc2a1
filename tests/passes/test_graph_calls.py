import torch
from torch import fx, nn

from modcompile.passes.graph_calls import append_arguments, append_placeholders, calls_of
from tests.passes.toy_stacks import SIZE

_cond = torch.ops.higher_order.cond


def _double(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (2 * x,)


def _negate(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (-x,)


def _graph() -> tuple[fx.GraphModule, fx.Node, fx.Node]:
    """Y = cond(any(x > 0), double, negate)(linear(x)), the call of the linear layer, and the cond."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    called = graph.call_module("linear", (x,))
    needed = graph.call_function(torch.any, (graph.call_function(torch.gt, (x, 0)),))
    branches = [graph.get_attr(name) for name in ("doubled", "negated")]
    chosen = graph.call_function(_cond, (needed, *branches, (called,)))
    graph.output(chosen)
    modules = {"linear": nn.Linear(SIZE, SIZE), "doubled": fx.symbolic_trace(_double)}
    return fx.GraphModule(modules | {"negated": fx.symbolic_trace(_negate)}, graph), called, chosen


def test_tells_what_modules_and_branches_are_called_on() -> None:
    gm, called, chosen = _graph()
    (x,) = gm.graph.find_nodes(op="placeholder")
    assert calls_of(called) == [("linear", (x,))]
    assert calls_of(chosen) == [("doubled", (called,)), ("negated", (called,))]
    assert [calls_of(node) for node in gm.graph.nodes if node not in (called, chosen)] == [[]] * (
        len(gm.graph.nodes) - 2
    )


@torch.no_grad()
def test_a_new_input_reaches_both_branches() -> None:
    gm, _, chosen = _graph()
    (added,) = append_placeholders(gm.graph, ["added"])
    append_arguments(chosen, [added])
    for name, _ in calls_of(chosen):
        branch = gm.get_submodule(name)
        assert isinstance(branch, fx.GraphModule)
        (more,) = append_placeholders(branch.graph, ["more"])
        (output,) = branch.graph.find_nodes(op="output")
        (result,) = output.args[0]
        with branch.graph.inserting_before(output):
            output.args = ((branch.graph.call_function(torch.add, (result, more)),),)
        branch.recompile()
    gm.recompile()
    linear, addend = gm.get_submodule("linear"), torch.randn(3, SIZE)
    for x, factor in ((torch.ones(3, SIZE), 2), (-torch.ones(3, SIZE), -1)):
        torch.testing.assert_close(gm(x, addend)[0], factor * linear(x) + addend)


def test_a_module_gets_new_arguments_last() -> None:
    gm, called, _ = _graph()
    (x,) = gm.graph.find_nodes(op="placeholder")
    first, second = append_placeholders(gm.graph, ["first", "second"])
    append_arguments(called, [first, second])
    assert called.args == (x, first, second)
    assert gm.graph.find_nodes(op="placeholder") == [x, first, second]
