"""What is left of a decoder block that is skipped: its keys and values.

Before::

    hidden, key, value = block(hidden, …)

After::

    key, value = cache_update(hidden, …);  hidden = clone(hidden)

where `cache_update` is the part of the block that its keys and values need. It is not written by hand: it is the block
without its hidden output, after dead-code elimination.
"""

import torch
from torch import fx

from modcompile.errors import UnsupportedModelError
from modcompile.passes.eliminate_dead_code import eliminate_dead_code, is_mutating
from modcompile.passes.lazy_graph_module import LazyGraphModule
from modcompile.passes.outlined_form import copy_graph


def skip_block(block: fx.GraphModule) -> fx.GraphModule:
    """Return what a skipped block does; it takes and returns what the block does.

    Keeps equal: keys and values, bit for bit.

    Raises:
        UnsupportedModelError: the block writes to a tensor in place.
    """
    graph, (_, *cache) = copy_graph(block)
    hidden = graph.find_nodes(op="placeholder")[0]
    # A branch of a cond must not return its input itself.
    graph.output((graph.call_function(torch.clone, (hidden,)), *cache))
    eliminate_dead_code(graph)
    for node in graph.nodes:
        if is_mutating(node):
            raise UnsupportedModelError(
                f"a decoder block writes to a tensor in place ({node.target}), so what its keys and values need can't "
                "be cut out of it; write that operation out of place"
            )
    return LazyGraphModule(block, graph)
