"""Let a graph be called like another that takes more.

Before::

    def branch(hidden, past_key): …

After::

    def branch(hidden, past_key, previous_0, previous_1): …      # which it does not read

The branches of a `torch.cond` take the same.
"""

from collections.abc import Sequence

from torch import fx

from modcompile.passes.graph_calls import append_placeholders
from modcompile.passes.lazy_graph_module import LazyGraphModule
from modcompile.passes.outlined_form import copy_graph


def add_unused_inputs(gm: fx.GraphModule, names: Sequence[str]) -> fx.GraphModule:
    """Return the graph with more inputs, behind those that it has.

    Keeps equal: every output.
    """
    graph, outputs = copy_graph(gm)
    append_placeholders(graph, names)
    graph.output(outputs)
    return LazyGraphModule(gm, graph)
