"""Cut a set of nodes out of a graph into a GraphModule of its own, which takes and returns tensors only.

Before, in one graph::

    n = sym_size(ids, 1)        # a symbolic int, made far away
    y = view(linear(x, w), [n, -1])

After::

    def subgraph(x):
        n = sym_size(x, 0)      # made anew, from an input that has it as a dimension
        return (view(linear(x, self.w), [n, -1]),)

`torch.cond` and ONNX subgraphs take tensors only, and a block that makes its own ints depends on no other.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from modcompile.passes.eliminate_dead_code import eliminate_dead_code
from modcompile.passes.lazy_graph_module import LazyGraphModule

_sym_size = torch.ops.aten.sym_size.int


def is_symbolic_int(node: fx.Node) -> bool:
    """Whether the node's value is a symbolic int (a dimension, or arithmetic on dimensions)."""
    return isinstance(node.meta.get("val"), (int, torch.SymInt))


def find_inputs(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """Tensors that `nodes` take from outside, in the order of first use.

    Parameters, buffers and constants are not inputs (they go inside); a symbolic int is one only through the tensor
    whose dimension it is, and that only if no other input has this dimension.
    """
    inside = set(nodes)
    outer = dict.fromkeys(arg for node in nodes for arg in node.all_input_nodes if arg not in inside)
    inputs = [node for node in outer if node.op != "get_attr" and not is_symbolic_int(node)]
    for node in outer:
        if is_symbolic_int(node):
            inputs.extend(source for source in _missing_sources(node, inputs) if source not in inputs)
    return inputs


def extract_subgraph(
    gm: fx.GraphModule,
    nodes: Sequence[fx.Node],
    inputs: Sequence[fx.Node],
    outputs: Sequence[fx.Node],
    prefix: str = "",
) -> fx.GraphModule:
    """A GraphModule `inputs → tuple(outputs)` of `nodes` (in topological order) that shares parameters with `gm`.

    `prefix` is cut off the names of parameters that have it: `model.layers.3.mlp.w` → `mlp.w`. Nodes that lead to none
    of `outputs` are left out. Placeholders are named after `inputs`.
    """
    graph = fx.Graph()
    attributes: dict[str, Any] = {}
    env: dict[fx.Node, fx.Node] = {}
    for node in inputs:
        env[node] = graph.placeholder(node.name)
        env[node].meta = dict(node.meta)

    def copied(node: fx.Node) -> fx.Node:
        if node not in env:
            if node.op == "get_attr":
                name = str(node.target).removeprefix(prefix)
                attributes[name] = get_attribute(gm, str(node.target))
                env[node] = graph.get_attr(name)
            elif is_symbolic_int(node):
                env[node] = _rebuild_int(node)
            else:
                raise ValueError(f"{node.name} is neither inside the subgraph nor one of its inputs")
            env[node].meta = dict(node.meta)
        return env[node]

    def _rebuild_int(node: fx.Node) -> fx.Node:
        position = _dimension(node, inputs)
        if position is not None:
            return graph.call_function(_sym_size, (env[inputs[position[0]]], position[1]))
        return graph.node_copy(node, copied)

    for node in nodes:
        if node.op == "call_module":
            attributes[str(node.target)] = gm.get_submodule(str(node.target))
        env[node] = graph.node_copy(node, copied)
    graph.output(tuple(env[node] for node in outputs))
    eliminate_dead_code(graph)
    used = {str(node.target) for node in graph.nodes if node.op in ("get_attr", "call_module")}
    return LazyGraphModule({name: value for name, value in attributes.items() if name in used}, graph)


def get_attribute(module: torch.nn.Module, name: str) -> Any:
    """The parameter, buffer or constant of `module` at a dotted name."""
    path, _, leaf = name.rpartition(".")
    return getattr(module.get_submodule(path), leaf)


def _expression(value: Any) -> Any:
    return value.node.expr if isinstance(value, torch.SymInt) else value


def _dimension(node: fx.Node, tensors: Sequence[fx.Node]) -> tuple[int, int] | None:
    """(index of the tensor, dimension) of the first of `tensors` that has the int as a dimension."""
    wanted = _expression(node.meta["val"])
    for index, tensor in enumerate(tensors):
        shape = getattr(tensor.meta.get("val"), "shape", ())
        for dim, size in enumerate(shape):
            if isinstance(size, torch.SymInt) and _expression(size) == wanted:
                return index, dim
    return None


def _missing_sources(node: fx.Node, inputs: Sequence[fx.Node]) -> list[fx.Node]:
    if _dimension(node, inputs) is not None:
        return []
    if node.target is _sym_size:
        return [node.all_input_nodes[0]]
    return [source for arg in node.all_input_nodes for source in _missing_sources(arg, inputs)]
