"""Write down shapes instead of computing them.

Before (for `[B, T, 576]` → `[B, T, 9, 64]`)::

    shape = Concat(Unsqueeze(Squeeze(Shape(x)[0:1])), Unsqueeze(Squeeze(Shape(x)[1:2])), [9], [64])
    y = Reshape(x, shape)

After::

    y = Reshape(x, [0, 0, 9, 64])

and likewise for `Expand`, where a 1 leaves a dimension as it is. In a decoder these nodes cost more than the reshape,
in every layer: inside the branches of an `If`, no two layers can share them.
"""

import numpy as np
import onnx_ir as ir


class FoldShapes(ir.passes.InPlacePass):
    """Make the shape operand of `Reshape` and `Expand` a constant where the dimensions that are known allow it."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in list(model.graph):
            if node.op_type not in ("Reshape", "Expand") or node.domain != "":
                continue
            operand, target = node.inputs[0], node.inputs[1]
            assert operand is not None and target is not None
            before, after = operand.shape, node.outputs[0].shape
            if before is None or after is None or target.const_value is not None:
                continue
            shape = _reshape(before, after) if node.op_type == "Reshape" else _expand(before, after)
            if shape is None:
                continue
            name = f"{node.op_type.lower()}_to_{'_'.join(map(str, shape))}".replace("-", "minus")
            node.replace_input_with(1, _constant(model.graph, name, shape))
            if node.op_type == "Reshape":
                node.attributes["allowzero"] = ir.AttrInt64("allowzero", 0)
            modified = True
        return ir.passes.PassResult(model, modified)


def _reshape(before: ir.Shape, after: ir.Shape) -> list[int] | None:
    """0 for a dimension that stays, -1 for at most one that is unknown."""
    shape = [_static(dim) for dim in after]
    for index, dim in enumerate(after):
        if shape[index] is None and index < len(before) and _same(dim, before[index]):
            shape[index] = 0
    unknown = [index for index, size in enumerate(shape) if size is None]
    if len(unknown) > 1 or any(dim == 0 for dim in after):
        return None
    return [-1 if size is None else size for size in shape]


def _expand(before: ir.Shape, after: ir.Shape) -> list[int] | None:
    """1 for a dimension that stays; every other must be known."""
    aligned = [1] * (len(after) - len(before)) + list(before)
    shape = [1 if _same(new, old) else _static(new) for new, old in zip(after, aligned, strict=True)]
    return None if None in shape else [size for size in shape if size is not None]


def _static(dim: int | ir.SymbolicDim) -> int | None:
    return dim if isinstance(dim, int) else None


def _same(one: int | ir.SymbolicDim, other: int | ir.SymbolicDim) -> bool:
    if isinstance(one, ir.SymbolicDim) and one.value is None:
        return False
    return one == other


def _constant(graph: ir.Graph, name: str, shape: list[int]) -> ir.Value:
    if name not in graph.initializers:
        tensor = ir.Tensor(np.array(shape, dtype=np.int64), name=name)
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
        graph.register_initializer(value)
    return graph.initializers[name]
