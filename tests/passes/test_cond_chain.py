import pytest
import torch
from torch import fx, nn

from modcompile.passes.cond_chain import add_cond_chain

_HIDDEN, _KEY = torch.ones(2, 3, 4), torch.ones(2, 1, 5, 4)


def _branch(factor: float) -> fx.GraphModule:
    graph = fx.Graph()
    hidden, key = graph.placeholder("hidden"), graph.placeholder("key")
    graph.output(tuple(graph.call_function(torch.mul, (value, factor)) for value in (hidden, key)))
    return fx.GraphModule({}, graph)


def _chain(count: int) -> fx.GraphModule:
    graph = fx.Graph()
    conditions = [graph.placeholder(f"is_{index}") for index in range(count)]
    operands = [graph.placeholder("hidden"), graph.placeholder("key")]
    modules: dict[str, nn.Module] = {}
    values = add_cond_chain(graph, modules, [_branch(index + 2.0) for index in range(count)], conditions, operands)
    graph.output(tuple(values))
    return fx.GraphModule(modules, graph)


@pytest.mark.parametrize(("count", "conds"), [(1, 0), (2, 1), (3, 3), (5, 5)])
def test_the_branch_that_is_true_gives_the_values(count: int, conds: int) -> None:
    gm = _chain(count)
    for chosen in range(count):
        flags = [torch.tensor(index == chosen) for index in range(count)]
        hidden, key = gm(*flags, _HIDDEN, _KEY)
        assert torch.equal(hidden, _HIDDEN * (chosen + 2))
        assert torch.equal(key, _KEY * (chosen + 2))
    assert sum(node.target is torch.ops.higher_order.cond for node in gm.graph.nodes) == conds


def test_the_others_do_not_run() -> None:
    gm, ran = _chain(4), list[str]()
    for name, module in gm.named_children():
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
    gm(*(torch.tensor(index == 2) for index in range(4)), _HIDDEN, _KEY)
    assert ran == ["nothing", "keep", "take_2", "keep"]
