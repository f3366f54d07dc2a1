"""Store weights in half of the bytes where that loses nothing.

Before::

    y = MatMul(x, w)

After, where float16 holds every value of w::

    w_float = Cast(w_half);  y = MatMul(x, w_float)

ONNX Runtime casts once, when a session starts: in memory, and for every product, nothing changes.
"""

import numpy as np
import onnx_ir as ir


class StoreHalf(ir.passes.InPlacePass):
    """Replace float32 initializers of two dimensions that float16 holds exactly."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        casts = []
        for name, value in list(model.graph.initializers.items()):
            tensor = value.const_value
            if tensor is None or tensor.dtype != ir.DataType.FLOAT or len(tensor.shape) != 2:
                continue
            # A session may override an optional input, in the type that it has.
            if value.is_graph_input() or value.is_graph_output() or not _is_exact_in_half(tensor):
                continue
            half = ir.Value(
                name=f"{name}_half",
                type=ir.TensorType(ir.DataType.FLOAT16),
                shape=ir.Shape(tensor.shape.numpy()),
                const_value=_Half(tensor, f"{name}_half"),
            )
            cast = ir.Node("", "Cast", [half], [ir.AttrInt64("to", ir.DataType.FLOAT)], name=f"{name}_cast")
            value.replace_all_uses_with(cast.outputs[0])
            del model.graph.initializers[name]
            cast.outputs[0].name = name
            model.graph.register_initializer(half)
            casts.append(cast)
        if casts:
            model.graph.insert_before(model.graph[0], casts)
        return ir.passes.PassResult(model, modified=bool(casts))


def _is_exact_in_half(tensor: ir.TensorProtocol) -> bool:
    values = tensor.numpy()
    with np.errstate(over="ignore"):  # becomes infinite, and so is no longer equal
        return bool(np.array_equal(values.astype(np.float16), values))


class _Half(ir.LazyTensor):
    """A matrix in float16 that exists only while it is read."""

    def __init__(self, tensor: ir.TensorProtocol, name: str) -> None:
        super().__init__(
            lambda: ir.Tensor(tensor.numpy().astype(np.float16), name=name),
            dtype=ir.DataType.FLOAT16,
            shape=ir.Shape(tensor.shape.numpy()),
            cache=False,
            name=name,
        )
