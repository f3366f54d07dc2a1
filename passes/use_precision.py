"""Multiply by quantized weights, without making them.

Before::

    y = linear(x, self.w, self.b)

After, for a precision that two parts of the weight make up::

    y = matmul_nbits(x, self.w_part_4_packed, self.w_part_4_scales, …)
      + matmul_nbits(x, self.w_part_8_packed, self.w_part_8_scales, …)
      + self.b

The original weight is no longer in the graph. Biases, and weights that were not quantized, stay.
"""

from collections.abc import Mapping

import torch
from torch import fx

from modcompile.passes.eliminate_dead_code import eliminate_dead_code
from modcompile.passes.extract_subgraph import get_attribute
from modcompile.passes.find_linears import LinearUse, find_linears
from modcompile.passes.lazy_graph_module import LazyGraphModule
from modcompile.passes.outlined_form import copy_graph
from modcompile.passes.quantized_ops import MATMUL_NBITS, operands
from modcompile.precisions import MultiPrecisionWeight

_aten = torch.ops.aten


def use_precision(block: fx.GraphModule, weights: Mapping[str, MultiPrecisionWeight], precision: int) -> fx.GraphModule:
    """Return the block on the weights of one precision; `weights` are named as the block's parameters.

    Keeps equal: everything, but for rounding, with those weights at `weights[name].dequantize(precision)`.
    """
    graph, outputs = copy_graph(block)
    graph.output(outputs)
    buffers: dict[str, torch.Tensor] = {}
    for use in reversed(find_linears(graph)):  # the last first: another may be its input
        name = str(use.weight.target)
        if name in weights:
            with graph.inserting_before(use.node):
                product = _product(graph, use, weights[name], precision, buffers)
            product.meta = dict(use.node.meta)
            use.node.replace_all_uses_with(product)
    eliminate_dead_code(graph)
    attributes = {}
    for node in graph.nodes:
        if node.op in ("get_attr", "call_module"):
            name = str(node.target)
            attributes[name] = buffers[name] if name in buffers else get_attribute(block, name)
    return LazyGraphModule(attributes, graph)


def _product(
    graph: fx.Graph,
    use: LinearUse,
    weight: MultiPrecisionWeight,
    precision: int,
    buffers: dict[str, torch.Tensor],
) -> fx.Node:
    terms = []
    for completed, part in weight.used_parts(precision).items():
        inputs = []
        for kind, tensor in operands(part).items():
            name = f"{use.weight.target}_part_{completed}_{kind}"
            buffers[name] = tensor
            inputs.append(graph.get_attr(name))
        packed, scales, *zero_points = inputs
        arguments = (use.x, packed, scales, zero_points[0] if zero_points else None, part.num_bits)
        terms.append(graph.call_function(MATMUL_NBITS, arguments))
    if use.bias is not None:
        terms.append(use.bias)
    total = terms[0]
    for term in terms[1:]:
        total = graph.call_function(_aten.add.Tensor, (total, term))
    return total
