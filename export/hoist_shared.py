"""Compute once what the branches of all layers compute from the same values.

Before, in the branches of every `If`, and in those of an `If` in them::

    If(needed_0) { …  c = Unsqueeze(cos, 1) … }
    If(needed_1) { …  c = Unsqueeze(cos, 1) … }

After::

    c = Unsqueeze(cos, 1)
    If(needed_0) { … c … }
    If(needed_1) { … c … }

In a graph without branches this is left to common-subexpression elimination; branches are scopes of their own, so that
rotary tables and the attention mask would be prepared anew in each. Hoisted is only what depends on nothing but
constants and values that the `If` nodes of more than one layer read: what belongs to one layer (the product of such a
value with a weight of its own, say) stays where it may be skipped.
"""

from collections.abc import Iterator

import onnx_ir as ir
import onnx_ir.passes.common as common_passes


class HoistShared(ir.passes.InPlacePass):
    """Move nodes on shared values out of the branches of `If` nodes, before the first of them, and merge equal ones."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        conditionals = [node for node in model.graph if node.op_type == "If"]
        shared = _read_by_many(model.graph, conditionals)
        hoisted = []
        for conditional in conditionals:
            for branch in _branches(conditional):
                for node in list(branch):
                    if not _reads_only(node, shared) or any(value.is_graph_output() for value in node.outputs):
                        continue
                    branch.remove(node)
                    hoisted.append(node)
                    shared.update(node.outputs)
        if not hoisted:
            return ir.passes.PassResult(model, modified=False)
        for node in hoisted:
            model.graph.insert_before(conditionals[0], node)
        # Branches are scopes of their own: two may have used one name.
        common_passes.NameFixPass()(model)
        common_passes.CommonSubexpressionEliminationPass()(model)
        return ir.passes.PassResult(model, modified=True)


def _branches(conditional: ir.Node) -> Iterator[ir.Graph]:
    """Those of the `If` nodes in them, too."""
    for attribute in conditional.attributes.values():
        branch = attribute.as_graph()
        yield branch
        for node in branch:
            if node.op_type == conditional.op_type:
                yield from _branches(node)


def _read_by_many(graph: ir.Graph, conditionals: list[ir.Node]) -> set[ir.Value]:
    """Constants, and values computed before the first `If`, that the `If` nodes of more than one layer read."""
    before = {value for value in graph.initializers.values() if not value.is_graph_input()}
    for node in graph:
        if node in conditionals:
            break
        before.update(node.outputs)
    readers: dict[ir.Value, set[str]] = {}
    for conditional in conditionals:
        for branch in _branches(conditional):
            for value in (value for node in branch for value in node.inputs):
                if value is not None and value in before:
                    readers.setdefault(value, set()).add(_layer(conditional))
    return {value for value, layers in readers.items() if len(layers) > 1}


def _layer(conditional: ir.Node) -> str:
    """`blocks.3` of `blocks.3.if`, and of `blocks.3.if_1`, the next of its chain."""
    return str(conditional.name).rpartition(".")[0] or str(id(conditional))


def _reads_only(node: ir.Node, shared: set[ir.Value]) -> bool:
    values = [value for value in node.inputs if value is not None]
    if any(attribute.type == ir.AttributeType.GRAPH for attribute in node.attributes.values()):
        return False
    return all(value in shared for value in values) and not all(value.is_initializer() for value in values)
