"""Store weights in the layout in which they are multiplied.

Before (twice, where two branches of an `If` use one weight)::

    y = MatMul(x, Transpose(w))

After::

    y = MatMul(x, w_transposed)

ONNX Runtime folds a transposed weight when a session starts, once for each branch that has it: that takes time, and a
copy in memory for each. A weight that something else reads as it is (an embedding tied to the head) stays.
"""

import numpy as np
import onnx_ir as ir


class PretransposeWeights(ir.passes.InPlacePass):
    """Replace initializers that are only ever transposed, `perm=[1, 0]`, by their transposes."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for name, value in list(model.graph.initializers.items()):
            users = [use.node for use in value.uses()]
            if not users or not all(_is_transpose(node) for node in users):
                continue
            # A session may override an optional input, in the layout that it has.
            if value.is_graph_input() or value.is_graph_output():
                continue
            assert value.const_value is not None
            rows, columns = value.const_value.shape.numpy()
            value.const_value = _Transposed(value.const_value, name)
            value.shape = ir.Shape((columns, rows))
            for node in users:
                node.outputs[0].replace_all_uses_with(value)
                assert node.graph is not None
                node.graph.remove(node, safe=True)
            modified = True
        return ir.passes.PassResult(model, modified)


def _is_transpose(node: ir.Node) -> bool:
    if node.op_type != "Transpose" or node.domain != "" or "perm" not in node.attributes:
        return False
    # An output of a graph has a name of its own, which an initializer can't take over.
    return list(node.attributes["perm"].as_ints()) == [1, 0] and not node.outputs[0].is_graph_output()


class _Transposed(ir.LazyTensor):
    """A transposed matrix that exists only while it is read."""

    def __init__(self, tensor: ir.TensorProtocol, name: str) -> None:
        rows, columns = tensor.shape.numpy()
        super().__init__(
            lambda: ir.Tensor(np.ascontiguousarray(tensor.numpy().T), name=name),
            dtype=tensor.dtype,
            shape=ir.Shape((columns, rows)),
            cache=False,
            name=name,
        )
