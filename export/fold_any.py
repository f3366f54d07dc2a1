"""Reduce booleans as booleans.

Before::

    needed = Cast(ReduceMax(Cast(routing_mask, int64)), bool)

After::

    needed = ReduceMax(routing_mask)

and likewise `ReduceMin`, whether all are true. Both take booleans from opset 20 on.
"""

import onnx_ir as ir

_REDUCTIONS = ("ReduceMax", "ReduceMin")


class FoldAny(ir.passes.InPlacePass):
    """Drop the casts around such a reduction that go from bool to another type and back."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in list(model.graph):
            if node.op_type not in _REDUCTIONS:
                continue
            (reduced,) = node.outputs
            before = node.inputs[0].producer() if node.inputs[0] is not None else None
            users = [use.node for use in reduced.uses()]
            if not (_is_cast(before, to_bool=False) and len(users) == 1 and _is_cast(users[0], to_bool=True)):
                continue
            assert before is not None
            source = before.inputs[0]
            if source is None or source.dtype != ir.DataType.BOOL or reduced.is_graph_output():
                continue
            (result,) = users[0].outputs
            node.replace_input_with(0, source)
            result.replace_all_uses_with(reduced, replace_graph_outputs=True)
            model.graph.remove(users[0], safe=True)
            # All that is known of the result, and its name: it may be an output of the graph.
            reduced.name, reduced.shape, reduced.dtype = result.name, result.shape, ir.DataType.BOOL
            modified = True
        return ir.passes.PassResult(model, modified)


def _is_cast(node: ir.Node | None, *, to_bool: bool) -> bool:
    if node is None or node.op_type != "Cast":
        return False
    return (node.attributes["to"].as_int() == ir.DataType.BOOL) == to_bool
