"""Let ONNX Runtime prepare the quantized weights of branches in branches, too.

Before::

    weights w
    If(all_open) { y = MatMulNBits(x, w) } else { If(needed) { z = MatMulNBits(x, w) } … }

After, where the reshaped weights have the shape that they had::

    weights w
    If(all_open) { y = MatMulNBits(x, w) } else { If(needed) { u = Reshape(w, shape); z = MatMulNBits(x, u) } … }

When a session starts, ONNX Runtime prepares the weights of a product that belong to its graph or to the one around it,
and no others: a product that reads one from further out took 130 times as long (a row of 4096 by codes of 4 bits,
4096 × 32768: 870 ms instead of 7). What reshapes a constant is computed when a session starts, and belongs to the
branch. What is prepared is shared by both products, what it was made of stays in memory: as many bytes as w has.
Weights that the branch has itself in the file would cost the same, in memory that a system can take back; but where
the file is a symbolic link, as in the cache of the Hugging Face hub, ONNX Runtime refuses those.
"""

from collections.abc import Iterator

import onnx_ir as ir

_PRODUCT = "MatMulNBits"


class InnerWeights(ir.passes.InPlacePass):
    """Reshape what products in branches in branches read of the main graph's initializers."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        inner = [each for branch in _branches(model.graph) for each in _all_branches(branch)]
        changed = [_reshape(branch, model.graph) for branch in inner]
        return ir.passes.PassResult(model, modified=any(changed))


def _reshape(branch: ir.Graph, main: ir.Graph) -> bool:
    reshaped: dict[ir.Value, ir.Value] = {}
    for node in [node for node in branch if node.op_type == _PRODUCT]:
        for index, value in enumerate(node.inputs):
            if value is None or main.initializers.get(str(value.name)) is not value or value.is_graph_input():
                continue
            if value not in reshaped:
                reshaped[value] = _insert(branch, value)
            node.replace_input_with(index, reshaped[value])
    return bool(reshaped)


def _insert(branch: ir.Graph, value: ir.Value) -> ir.Value:
    assert value.shape is not None
    name = f"{branch.name}.{value.name}"
    shape = ir.Node("", "Constant", [], [ir.AttrInt64s("value_ints", value.shape.numpy())])
    reshape = ir.Node("", "Reshape", [value, shape.outputs[0]], name=name)
    shape.outputs[0].name, reshape.outputs[0].name = f"{name}.shape", name
    reshape.outputs[0].type, reshape.outputs[0].shape = value.type, value.shape
    branch.insert_before(branch[0], (shape, reshape))
    return reshape.outputs[0]


def _branches(graph: ir.Graph) -> Iterator[ir.Graph]:
    for node in graph:
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                yield attribute.as_graph()


def _all_branches(graph: ir.Graph) -> Iterator[ir.Graph]:
    for branch in _branches(graph):
        yield branch
        yield from _all_branches(branch)
