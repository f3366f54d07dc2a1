"""Let a decoder block change some of the tokens only.

Before::

    y, key, value = block(hidden, …)

After, where `skip` is what the other tokens go through, by default nothing::

    y, key, value = block(hidden, …)
    hidden = where(is_open, y, skip(hidden))
"""

import torch
from torch import fx, nn

from modcompile.passes.lazy_graph_module import LazyGraphModule
from modcompile.passes.outlined_form import getitems, num_outputs
from modcompile.passes.skip_path import call_skip, skip_child


def masked_block(block: fx.GraphModule, skip: nn.Module | None = None) -> fx.GraphModule:
    """Return a graph that takes what the block takes, then `is_open [B, T, 1]` (bool), and returns what it returns.

    `block` and `skip` (`skip_path`) are shared, not copied.

    Keeps equal: keys and values; the hidden states of the open tokens.
    """
    graph = fx.Graph()
    inputs = [graph.placeholder(node.name) for node in block.graph.find_nodes(op="placeholder")]
    is_open = graph.placeholder("is_open")
    executed, *cache = getitems(graph.call_module("block", tuple(inputs)), num_outputs(block))
    skipped = call_skip(graph, inputs[0], skip)
    graph.output((graph.call_function(torch.where, (is_open, executed, skipped)), *cache))
    return LazyGraphModule({"block": block, **skip_child(skip)}, graph)
