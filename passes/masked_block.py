"""Let a decoder block change some of the tokens only.

Before::

    y, key, value = block(hidden, …)

After::

    y, key, value = block(hidden, …)
    hidden = where(is_open, y, hidden)
"""

import torch
from torch import fx

from modcompile.passes.lazy_graph_module import LazyGraphModule
from modcompile.passes.outlined_form import getitems, num_outputs


def masked_block(block: fx.GraphModule) -> fx.GraphModule:
    """Return a graph that takes what the block takes, then `is_open [B, T, 1]` (bool), and returns what it returns.

    Keeps equal: keys and values; the hidden states of the open tokens.
    """
    graph = fx.Graph()
    inputs = [graph.placeholder(node.name) for node in block.graph.find_nodes(op="placeholder")]
    is_open = graph.placeholder("is_open")
    executed, *cache = getitems(graph.call_module("block", tuple(inputs)), num_outputs(block))
    graph.output((graph.call_function(torch.where, (is_open, executed, inputs[0])), *cache))
    return LazyGraphModule({"block": block}, graph)
