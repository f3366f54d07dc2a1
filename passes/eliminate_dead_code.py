"""Remove the nodes that no output needs.

Before::

    y, key, value = f(x)      # attention, MLP, cache update
    return key, value

After::

    key, value = the part of f(x) that they need
    return key, value

The default of `torch.fx` keeps attention, which it takes for random, drops what writes to a tensor in place, whose
result nobody reads, and refuses graphs that no module owns yet.
"""

from torch import fx
from torch._ops import OpOverload


def eliminate_dead_code(graph: fx.Graph) -> bool:
    """Remove dead nodes in place, placeholders and mutating calls excepted; tell whether there were any."""
    return graph.eliminate_dead_code(
        is_impure_node=lambda node: node.op in ("placeholder", "output") or is_mutating(node)
    )


def is_mutating(node: fx.Node) -> bool:
    """Whether the node calls an operator that writes to one of its inputs."""
    return isinstance(node.target, OpOverload) and node.target._schema.is_mutable
