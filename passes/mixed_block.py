"""Let a gate decide how much a decoder block changes each token.

Before::

    y, key, value = block(hidden, …)

After, where `skip` is what a skipped token goes through, by default nothing::

    y, key, value = block(hidden, …)
    hidden = gate * y + (1 - gate) * skip(hidden)
"""

import operator

from torch import fx, nn

from modcompile.passes.lazy_graph_module import LazyGraphModule
from modcompile.passes.outlined_form import getitems, num_outputs
from modcompile.passes.skip_path import call_skip, skip_child


def mixed_block(block: fx.GraphModule, skip: nn.Module | None = None) -> fx.GraphModule:
    """Return a graph that takes what the block takes, then `gate [B, T, 1]`, and returns what it returns.

    `block` and `skip` (`skip_path`) are shared, not copied.

    Keeps equal: keys and values; with a gate of 1 every output, bit for bit.
    """
    graph = fx.Graph()
    inputs = [graph.placeholder(node.name) for node in block.graph.find_nodes(op="placeholder")]
    gate = graph.placeholder("gate")
    executed, *cache = getitems(graph.call_module("block", tuple(inputs)), num_outputs(block))
    kept = graph.call_function(operator.mul, (gate, executed))
    closed = graph.call_function(operator.sub, (1, gate))
    skipped = graph.call_function(operator.mul, (closed, call_skip(graph, inputs[0], skip)))
    graph.output((graph.call_function(operator.add, (kept, skipped)), *cache))
    return LazyGraphModule({"block": block, **skip_child(skip)}, graph)
