"""Multiply codes by activations as they are, rather than rounded to 8 bits.

Before::

    y = MatMulNBits[accuracy_level = 4](x, codes, scales)

After::

    y = MatMulNBits[accuracy_level = 1](x, codes, scales)

Slow, and comparable: rounding amplifies the last digit of a float to a step of an integer, so that after some layers
two sound runtimes (or one, with another order of sums) are as far apart as either is from the model without rounding.
"""

import onnx_ir as ir

_FLOAT32 = 1


class FloatActivations(ir.passes.InPlacePass):
    """Set the accuracy level of every `MatMulNBits`, inside of branches too, to float32."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        products = [node for node in model.graph.all_nodes() if node.op_type == "MatMulNBits"]
        for node in products:
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", _FLOAT32)
        return ir.passes.PassResult(model, modified=bool(products))
