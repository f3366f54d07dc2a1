import torch
from torch import fx

from modcompile.passes.graph_patterns import dtype_of, either_order, is_call, is_reshape, shape_of
from tests.passes.traced import BATCH, TOKENS, Run, random, traced

_aten = torch.ops.aten


def _nodes() -> list[fx.Node]:
    gm = traced(Run(lambda _, x: (x + 1).view(x.shape[0], -1)), random(BATCH, TOKENS, 4))
    return [node for node in gm.graph.nodes if node.op != "get_attr"]


def test_calls_are_told_by_their_operator() -> None:
    placeholder, *_ = nodes = _nodes()
    (add,) = [node for node in nodes if is_call(node, _aten.add.Tensor)]
    assert is_call(add, _aten.mul.Tensor, _aten.add.Tensor)
    assert not is_call(add, _aten.mul.Tensor)
    assert not is_call(placeholder, _aten.add.Tensor)
    assert not is_call(1.0, _aten.add.Tensor)
    assert list(either_order(add)) == [(placeholder, 1), (1, placeholder)]


def test_reshapes_are_told() -> None:
    assert [str(node.target) for node in _nodes() if is_reshape(node)] == ["aten.view.default"]


def test_sizes_can_be_compared_across_nodes() -> None:
    placeholder, *rest = _nodes()
    (add,) = [node for node in rest if is_call(node, _aten.add.Tensor)]
    assert shape_of(add) == shape_of(placeholder)
    assert len(set(shape_of(add))) == 3
    assert shape_of(add)[2] == 4
    assert dtype_of(add) is torch.float32


def test_what_is_not_known_is_empty() -> None:
    node = fx.Graph().placeholder("x")
    assert (shape_of(node), dtype_of(node)) == ((), None)
    assert (shape_of(1.0), dtype_of(1.0)) == ((), None)
