import copy
import operator
import pickle

import torch
from torch import fx

from modcompile.passes.lazy_graph_module import LazyGraphModule


def _double(factor: int = 2) -> fx.Graph:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output((graph.call_function(operator.mul, (x, factor)),))
    return graph


def _calling(inner: fx.GraphModule) -> LazyGraphModule:
    graph = fx.Graph()
    x = graph.placeholder("x")
    call = graph.call_module("inner", (x,))
    graph.output((graph.call_function(operator.getitem, (call, 0)),))
    return LazyGraphModule({"inner": inner}, graph)


def _is_compiled(gm: fx.GraphModule) -> bool:
    return "forward" in vars(type(gm))


def test_only_what_runs_is_compiled_and_computes_the_graph() -> None:
    run, other = LazyGraphModule({}, _double()), LazyGraphModule({}, _double(3))
    outer = _calling(run)
    assert not any(_is_compiled(gm) for gm in (run, other, outer))
    x = torch.ones(3)
    for _ in range(2):
        assert torch.equal(outer(x)[0], 2 * x)
    assert _is_compiled(run)
    assert _is_compiled(outer)
    assert not _is_compiled(other)
    assert torch.equal(other(x)[0], 3 * x)


def test_a_changed_graph_runs_changed() -> None:
    gm = LazyGraphModule({}, _double())
    x = torch.ones(3)
    assert torch.equal(gm(x)[0], 2 * x)
    (product,) = gm.graph.find_nodes(op="call_function", target=operator.mul)
    product.args = (product.args[0], 5)
    gm.recompile()
    assert torch.equal(gm(x)[0], 5 * x)


def test_the_code_can_be_read_before_it_runs() -> None:
    assert "x * 2" in LazyGraphModule({}, _double()).code
    assert "x * 2" in str(LazyGraphModule({}, _double()))


def test_a_forward_that_was_taken_before_the_first_call_can_be_called_again_and_again() -> None:
    gm = LazyGraphModule({}, _double())
    forward = type(gm).forward.__get__(gm)  # as gradient checkpointing takes it
    x = torch.ones(3)
    for _ in range(2):
        assert torch.equal(forward(x)[0], 2 * x)


def test_comes_back_from_a_pickle() -> None:
    gm = _calling(LazyGraphModule({}, _double()))
    x = torch.ones(3)
    for _ in range(2):
        assert torch.equal(pickle.loads(pickle.dumps(gm))(x)[0], 2 * x)
        assert torch.equal(gm(x)[0], 2 * x)


def test_takes_keywords_from_the_first_call_on() -> None:
    gm, x = LazyGraphModule({}, _double()), torch.ones(3)
    for _ in range(2):
        assert torch.equal(gm(x=x)[0], 2 * x)


def test_a_copy_stands_for_itself() -> None:
    gm = LazyGraphModule({}, _double())
    duplicate = copy.deepcopy(gm)
    x = torch.ones(3)
    assert torch.equal(duplicate(x)[0], 2 * x)
    assert not _is_compiled(gm)
    assert torch.equal(gm(x)[0], 2 * x)
