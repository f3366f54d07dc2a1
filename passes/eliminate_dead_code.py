"""Remove the nodes that no output needs.

Before::

    y, key, value = f(x)      # attention, MLP, cache update
    return key, value

After::

    key, value = the part of f(x) that they need
    return key, value

The default of `torch.fx` keeps attention, which it takes for random, and refuses graphs that no module owns yet.
"""

from torch import fx


def eliminate_dead_code(graph: fx.Graph) -> bool:
    """Remove dead nodes in place, placeholders excepted; tell whether there were any."""
    return graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
