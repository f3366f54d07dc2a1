"""Multiply by quantized weights, and look tokens up in them, without making them.

Before::

    x = embedding(self.e, input_ids)
    y = linear(x, self.w, self.b)

After, in the graphs that are called, too::

    x = gather_block_quantized(input_ids, self.e_packed, self.e_scales, …)
    y = matmul_nbits(x, self.w_packed, self.w_scales, …) + self.b

The codes of one parameter are one tensor wherever it is used: in two branches, or as embedding and head. Biases stay,
and so do norms, routers and embeddings of positions: they are small, and one rounded position would be in every token.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn

from modcompile.passes.eliminate_dead_code import eliminate_dead_code
from modcompile.passes.extract_subgraph import get_attribute
from modcompile.passes.find_linears import LinearUse, find_linears
from modcompile.passes.graph_patterns import is_call, is_reshape
from modcompile.passes.lazy_graph_module import LazyGraphModule
from modcompile.passes.nested_graphs import all_graphs, map_graphs
from modcompile.passes.outlined_form import copy_graph
from modcompile.passes.quantized_ops import GATHER_BLOCK_QUANTIZED, MATMUL_NBITS, operands
from modcompile.precisions import PackedWeight

_aten = torch.ops.aten

Operands = tuple[dict[str, torch.Tensor], int]
"""What the operators read of a weight, by name, and its bits."""


def find_weights(*modules: nn.Module) -> dict[nn.Parameter, bool]:
    """The parameters that the graphs in `modules` multiply by or look tokens up in.

    And whether each is `[in, out]`, as in GPT-2, rather than `[out, in]`; one that is both is left out.
    """
    found: dict[nn.Parameter, set[bool]] = {}
    for called in (gm for module in modules for gm in all_graphs(module)):
        uses = [(use.weight, use.is_transposed) for use in find_linears(called.graph)]
        uses += [(node.all_input_nodes[0], False) for node in _token_embeddings(called.graph)]
        for node, is_transposed in uses:
            weight = get_attribute(called, str(node.target))
            if isinstance(weight, nn.Parameter):
                found.setdefault(weight, set()).add(is_transposed)
    return {weight: True in ways for weight, ways in found.items() if len(ways) == 1}


def quantize_weights(gm: fx.GraphModule, weights: Mapping[nn.Parameter, PackedWeight]) -> fx.GraphModule:
    """Return the graph on the codes of those of its parameters that are keys of `weights`, as `find_weights` has them.

    Keeps equal: everything, but for rounding, with the parameters at `weights[parameter].dequantize()`.
    """
    codes = {weight: (operands(packed), packed.num_bits) for weight, packed in weights.items()}
    return map_graphs(gm, lambda called: _quantize(called, codes))


def _quantize(gm: fx.GraphModule, codes: Mapping[Any, Operands]) -> fx.GraphModule:
    graph, outputs = copy_graph(gm)
    graph.output(outputs)
    buffers: dict[str, torch.Tensor] = {}

    def found(weight: fx.Node) -> Operands | None:
        return codes.get(get_attribute(gm, str(weight.target)))

    for use in reversed(find_linears(graph)):  # the last first: another may be its input
        if (read := found(use.weight)) is not None:
            with graph.inserting_before(use.node):
                _replace(use.node, _product(use, read, buffers))
    for node in _token_embeddings(graph):
        weight, ids = node.all_input_nodes
        if (read := found(weight)) is not None:
            with graph.inserting_before(node):
                width = get_attribute(gm, str(weight.target)).shape[1]
                inputs = _get_operands(graph, weight, read, buffers)
                _replace(node, graph.call_function(GATHER_BLOCK_QUANTIZED, (ids, *inputs, width)))
    eliminate_dead_code(graph)
    attributes = {}
    for node in graph.nodes:
        if node.op in ("get_attr", "call_module"):
            name = str(node.target)
            attributes[name] = buffers[name] if name in buffers else get_attribute(gm, name)
    return LazyGraphModule(attributes, graph)


def _product(use: LinearUse, read: Operands, buffers: dict[str, torch.Tensor]) -> fx.Node:
    graph = use.node.graph
    product = graph.call_function(MATMUL_NBITS, (use.x, *_get_operands(graph, use.weight, read, buffers)))
    if use.bias is None:
        return product
    product.meta = dict(use.node.meta)
    return graph.call_function(_aten.add.Tensor, (product, use.bias))


def _get_operands(graph: fx.Graph, weight: fx.Node, read: Operands, buffers: dict[str, torch.Tensor]) -> list[Any]:
    """The last arguments that both operators have in common."""
    tensors, num_bits = read
    inputs: dict[str, Any] = dict.fromkeys(("packed", "scales", "zero_points"))
    for kind, tensor in tensors.items():
        name = f"{weight.target}_{kind}"
        buffers[name] = tensor
        inputs[kind] = graph.get_attr(name)
    return [*inputs.values(), num_bits]


def _replace(node: fx.Node, replacement: fx.Node) -> None:
    replacement.meta = dict(node.meta)
    node.replace_all_uses_with(replacement)


def _token_embeddings(graph: fx.Graph) -> list[fx.Node]:
    """The nodes that look `input_ids` up in a weight of their own module."""
    found = []
    for node in graph.nodes:
        if is_call(node, _aten.embedding.default):
            weight, ids = node.all_input_nodes
            while is_reshape(ids):
                ids = ids.all_input_nodes[0]
            if weight.op == "get_attr" and ids.op == "placeholder" and ids.name == "input_ids":
                found.append(node)
    return found
