"""Multiply by other weights.

Before::

    y = linear(x, self.w)

After::

    y = linear(x, self.w_4)      # another tensor of the same shape
"""

from collections.abc import Mapping

import torch
from torch import fx

from modcompile.passes.extract_subgraph import get_attribute
from modcompile.passes.lazy_graph_module import LazyGraphModule
from modcompile.passes.outlined_form import copy_graph


def replace_weights(block: fx.GraphModule, weights: Mapping[str, torch.Tensor], suffix: str) -> fx.GraphModule:
    """Return the block with other tensors for the parameters that are keys of `weights`, named `{name}_{suffix}`.

    Keeps equal: everything but those parameters. They become buffers: nothing trains them.
    """
    graph, outputs = copy_graph(block)
    attributes = {}
    for node in graph.nodes:
        if node.op == "get_attr" and str(node.target) in weights:
            replacement = weights[str(node.target)]
            node.target = f"{node.target}_{suffix}"
            attributes[node.target] = replacement
        elif node.op in ("get_attr", "call_module"):
            attributes[str(node.target)] = get_attribute(block, str(node.target))
    graph.output(outputs)
    return LazyGraphModule(attributes, graph)
