"""What a node calls: a module, or the branches of a `torch.cond`; and handing them more."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

_cond = torch.ops.higher_order.cond


def calls_of(node: fx.Node) -> list[tuple[str, Sequence[Any]]]:
    """The names of the modules that a node calls, and on what."""
    if node.op == "call_module":
        return [(str(node.target), node.args)]
    if node.target is _cond:
        _, then_branch, else_branch, operands = node.args
        assert isinstance(operands, list | tuple)
        branches = [branch for branch in (then_branch, else_branch) if isinstance(branch, fx.Node)]
        return [(str(branch.target), operands) for branch in branches]
    return []


def append_arguments(call: fx.Node, values: Sequence[fx.Node]) -> None:
    """Hand `values` on to what a node calls, behind what it gets."""
    if call.target is _cond:
        *condition_and_branches, operands = call.args
        assert isinstance(operands, list | tuple)
        call.args = (*condition_and_branches, (*operands, *values))
    else:
        call.args = (*call.args, *values)


def append_placeholders(graph: fx.Graph, names: Sequence[str]) -> list[fx.Node]:
    """New inputs of a graph, in place, behind those that it has."""
    added: list[fx.Node] = []
    last = graph.find_nodes(op="placeholder")[-1]
    for name in names:
        with graph.inserting_after(last):
            last = graph.placeholder(name)
        added.append(last)
    return added
