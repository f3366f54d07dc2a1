"""Multiply by quantized weights as ONNX Runtime does on a CPU: with activations rounded to 8 bits.

Before::

    y = linear(x, self.w)

After::

    y = linear(round_to_int8(x, group_size), self.w)

`MatMulNBits` at accuracy level 4 rounds each run of `group_size` features to 255 steps of its own, and then multiplies
whole numbers. So does this, but for the order of sums: it tells what an artifact computes to the last digits.
"""

from collections.abc import Mapping

import torch
from torch import fx
from torch.nn import functional

from modcompile.passes.extract_subgraph import get_attribute
from modcompile.passes.find_linears import find_linears
from modcompile.passes.lazy_graph_module import LazyGraphModule
from modcompile.passes.nested_graphs import map_graphs
from modcompile.passes.outlined_form import copy_graph

_LARGEST = 127


def round_to_int8(x: torch.Tensor, group_size: int) -> torch.Tensor:
    """Each run of `group_size` values of the last dimension, rounded to multiples of its largest magnitude / 127."""
    size = x.shape[-1]
    groups = functional.pad(x, (0, -size % group_size)).unflatten(-1, (-1, group_size))
    largest = groups.abs().amax(-1, keepdim=True)
    inverse = torch.where(largest > 0, _LARGEST / largest, 0)
    rounded: torch.Tensor = (groups * inverse).round() * (largest / _LARGEST)
    return rounded.flatten(-2)[..., :size]


def round_activations(gm: fx.GraphModule, group_sizes: Mapping[torch.Tensor, int]) -> fx.GraphModule:
    """Return the graph with rounded inputs of the products with the weights in `group_sizes`, in graphs it calls, too.

    Keeps equal: everything, but for the rounding.
    """
    return map_graphs(gm, lambda called: _round(called, group_sizes))


def _round(gm: fx.GraphModule, group_sizes: Mapping[torch.Tensor, int]) -> fx.GraphModule:
    graph, outputs = copy_graph(gm)
    graph.output(outputs)
    rounded: dict[tuple[fx.Node, int], fx.Node] = {}
    for use in find_linears(graph):
        group_size = group_sizes.get(get_attribute(gm, str(use.weight.target)))
        if group_size is not None:
            key = use.x, group_size
            if key not in rounded:
                with graph.inserting_before(use.node):
                    rounded[key] = graph.call_function(round_to_int8, key)
            use.node.replace_input_with(use.x, rounded[key])
    return LazyGraphModule(gm, graph)
