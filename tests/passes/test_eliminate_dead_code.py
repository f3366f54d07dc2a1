import torch
from torch import fx

from modcompile.passes.eliminate_dead_code import eliminate_dead_code

_attention = torch.ops.aten.scaled_dot_product_attention.default


def _graph() -> fx.Graph:
    """Of no module, with an unused input and a dead chain that ends in attention."""
    graph = fx.Graph()
    x, _ = graph.placeholder("x"), graph.placeholder("unused")
    doubled = graph.call_function(torch.mul, (x, 2))
    graph.call_function(_attention, (doubled, doubled, doubled))
    graph.output((x,))
    return graph


def test_removes_dead_attention_and_what_only_it_needs() -> None:
    graph = _graph()
    assert eliminate_dead_code(graph)
    assert [node.op for node in graph.nodes] == ["placeholder", "placeholder", "output"]


def test_keeps_live_attention() -> None:
    graph = _graph()
    (attention,) = graph.find_nodes(op="call_function", target=_attention)
    (output,) = graph.find_nodes(op="output")
    output.args = ((attention,),)
    assert not eliminate_dead_code(graph)
    assert attention in graph.nodes


def test_idempotent() -> None:
    graph = _graph()
    eliminate_dead_code(graph)
    assert not eliminate_dead_code(graph)


def test_keeps_what_writes_to_a_tensor_that_is_read() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    copy = graph.call_function(torch.ops.aten.clone.default, (x,))
    graph.call_function(torch.ops.aten.mul_.Tensor, (copy, 2))
    graph.output((copy,))
    assert not eliminate_dead_code(graph)
    gm = fx.GraphModule({}, graph)
    assert torch.equal(gm(torch.ones(2))[0], torch.full((2,), 2.0))
