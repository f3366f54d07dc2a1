"""What is left of a decoder block that is skipped: its keys and values, and what a token goes through instead.

Before::

    hidden, key, value = block(hidden, …)

After, where `skip` is `clone` unless something is given::

    key, value = cache_update(hidden, …);  hidden = skip(hidden)

where `cache_update` is the part of the block that its keys and values need. It is not written by hand: it is the block
without its hidden output, after dead-code elimination.
"""

import torch
from torch import fx, nn

from modcompile.errors import UnsupportedModelError
from modcompile.passes.eliminate_dead_code import eliminate_dead_code, is_mutating
from modcompile.passes.extract_subgraph import get_attribute
from modcompile.passes.lazy_graph_module import LazyGraphModule
from modcompile.passes.outlined_form import copy_graph
from modcompile.passes.skip_path import call_skip, skip_child


def skip_block(block: fx.GraphModule, skip: nn.Module | None = None) -> fx.GraphModule:
    """Return what a skipped block does; it takes and returns what the block does.

    Keeps equal: keys and values, bit for bit.

    Raises:
        UnsupportedModelError: the block writes to a tensor in place.
    """
    graph, (_, *cache) = copy_graph(block)
    hidden = graph.find_nodes(op="placeholder")[0]
    # A branch of a cond must not return its input itself.
    skipped = graph.call_function(torch.clone, (hidden,)) if skip is None else call_skip(graph, hidden, skip)
    graph.output((skipped, *cache))
    eliminate_dead_code(graph)
    for node in graph.nodes:
        if is_mutating(node):
            raise UnsupportedModelError(
                f"a decoder block writes to a tensor in place ({node.target}), so what its keys and values need can't "
                "be cut out of it; write that operation out of place"
            )
    held = {str(node.target) for node in graph.nodes if node.op in ("get_attr", "call_module")} - {*skip_child(skip)}
    return LazyGraphModule({name: get_attribute(block, name) for name in held} | skip_child(skip), graph)
