"""Remove from a trace what pins its shapes, types and devices, and what does nothing.

Before::

    _guards_fn(input_ids, …)
    _assert_tensor_metadata(x, dtype=float32)
    y = slice(x, 0, 0, 2**63 - 1)
    z = f(y)

After::

    z = f(x)

`torch.export` specialises what it records to the example that it saw: without these nodes the same graph runs at
other lengths (an empty cache among them), under autocast, and on another device.
"""

import torch
from torch import fx

from modcompile.passes.lazy_graph_module import LazyGraphModule

_aten = torch.ops.aten
_TO_THE_END = 2**63 - 1


def drop_guards(gm: fx.GraphModule) -> fx.GraphModule:
    """Return a GraphModule with flat inputs and outputs that shares its parameters with `gm`.

    Keeps equal: every output, for every input.
    """
    graph = fx.Graph()
    copied = graph.graph_copy(gm.graph, {})
    assert copied is not None
    graph.output(tuple(_flat(copied)))
    for node in list(graph.nodes):
        if _is_guard(node):
            graph.erase_node(node)
        elif _is_whole_slice(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    result = LazyGraphModule(gm, graph)
    result.graph.lint()
    return result


def _is_guard(node: fx.Node) -> bool:
    return (node.op == "call_module" and node.target == "_guards_fn") or (
        node.op == "call_function" and node.target is _aten._assert_tensor_metadata.default
    )


def _is_whole_slice(node: fx.Node) -> bool:
    return (
        node.op == "call_function"
        and node.target is _aten.slice.Tensor
        and len(node.args) == 4
        and node.args[2:] == (0, _TO_THE_END)
    )


def _flat(value: object) -> list[fx.Node]:
    if isinstance(value, fx.Node):
        return [value]
    assert isinstance(value, (tuple, list)), f"a trace returns tensors, not {type(value)}"
    return [node for item in value for node in _flat(item)]
