"""One graph for several branches on the same inputs, that computes once what they have in common.

Before::

    (y_4, …) = branch_4(hidden, cos, sin, mask)      # norm, linear, …
    (y_8, …) = branch_8(hidden, cos, sin, mask)      # the same norm, another linear, …

After::

    (y_4, …, y_8, …) = branches(hidden, cos, sin, mask)      # norm, linear, another linear, …

Copies of a block that differ in the weights of their linear layers share what comes before them, and parameters.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn
from torch._ops import OpOverload

from modcompile.passes.extract_subgraph import get_attribute
from modcompile.passes.lazy_graph_module import LazyGraphModule

_RANDOM = torch.Tag.nondeterministic_seeded


def merge_branches(branches: Sequence[fx.GraphModule]) -> fx.GraphModule:
    """A flat GraphModule that returns the outputs of all `branches` in turn; their placeholders must be the same.

    A tensor that several branches share keeps its name; what is a branch's own gets the number of the branch before it.

    Keeps equal: every output, bit for bit.
    """
    graph = fx.Graph()
    placeholders = [node.name for node in branches[0].graph.find_nodes(op="placeholder")]
    inputs = [graph.placeholder(name) for name in placeholders]
    known: dict[Any, fx.Node] = {}
    attributes: dict[str, torch.Tensor | nn.Module] = {}
    outputs: list[fx.Node] = []
    for number, branch in enumerate(branches):
        env: dict[fx.Node, fx.Node] = {}
        for node, merged in zip(branch.graph.find_nodes(op="placeholder"), inputs, strict=True):
            env[node] = merged
            merged.meta = dict(node.meta)
        for node in branch.graph.nodes:
            if node.op in ("placeholder", "output"):
                continue
            key = _key(branch, node, env)
            if key is None or key not in known:
                copied = graph.node_copy(node, env.__getitem__)
                if node.op in ("get_attr", "call_module"):
                    copied.target = _add(attributes, str(node.target), _attribute(branch, node), number)
                env[node] = copied
                if key is not None:
                    known[key] = copied
            else:
                env[node] = known[key]
        (output,) = branch.graph.find_nodes(op="output")
        outputs += [env[node] for node in output.args[0]]
    graph.output(tuple(outputs))
    return LazyGraphModule(attributes, graph)


def _key(branch: fx.GraphModule, node: fx.Node, env: dict[fx.Node, fx.Node]) -> Any:
    """Equal for nodes that compute the same; None for those that may not, though all looks alike."""
    if node.op == "get_attr":
        return "get_attr", id(_attribute(branch, node))
    if node.op != "call_function" or (isinstance(node.target, OpOverload) and _RANDOM in node.target.tags):
        return None
    arguments = fx.node.map_arg((node.args, node.kwargs), lambda arg: env[arg])
    return node.target, _frozen(arguments)


def _attribute(branch: fx.GraphModule, node: fx.Node) -> Any:
    return get_attribute(branch, str(node.target))


def _add(attributes: dict[str, Any], target: str, value: Any, number: int) -> str:
    if target in attributes and attributes[target] is not value:
        path, dot, leaf = target.rpartition(".")
        target = f"{path}{dot}branch_{number}_{leaf}"
    attributes[target] = value
    return target


def _frozen(value: Any) -> Any:
    """As a key of a dictionary: lists as tuples, and numbers with their type, since 1 == 1.0 == True."""
    if isinstance(value, fx.Node):
        return value
    if isinstance(value, list | tuple):
        return tuple(_frozen(item) for item in value)
    if isinstance(value, dict):
        return tuple((key, _frozen(item)) for key, item in sorted(value.items()))
    if isinstance(value, slice):
        return "slice", _frozen((value.start, value.stop, value.step))
    return type(value), value
