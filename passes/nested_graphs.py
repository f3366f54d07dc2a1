"""A graph and the graphs that it calls, branches of `torch.cond` included."""

from collections.abc import Callable, Iterator

from torch import fx, nn

from modcompile.passes.extract_subgraph import get_attribute
from modcompile.passes.lazy_graph_module import LazyGraphModule
from modcompile.passes.outlined_form import copy_graph


def map_graphs(gm: fx.GraphModule, change: Callable[[fx.GraphModule], fx.GraphModule]) -> fx.GraphModule:
    """Return `gm` with `change` applied to every GraphModule that it calls, and last to itself.

    Parameters, and modules that are no GraphModules, are shared with `gm`.
    """
    graph, outputs = copy_graph(gm)
    graph.output(outputs)
    attributes = {}
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            value = get_attribute(gm, str(node.target))
            attributes[str(node.target)] = map_graphs(value, change) if isinstance(value, fx.GraphModule) else value
    return change(LazyGraphModule(attributes, graph))


def all_graphs(module: nn.Module) -> Iterator[fx.GraphModule]:
    """Every GraphModule in a module, itself included, the outer first."""
    return (inner for inner in module.modules() if isinstance(inner, fx.GraphModule))
