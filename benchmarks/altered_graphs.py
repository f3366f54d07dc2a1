"""Exports with something taken out, to see what it costs: what they compute with every gate open stays the same."""

from pathlib import Path

import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from modcompile.export.session import MODEL_FILE


def without_ifs(model: ir.Model, *, masks: bool = True) -> ir.Model:
    """Put what an open gate executes in the place of every `If`; without `masks`, for all tokens alike.

    Changes `model`, and returns it. What decides on a gate is left where something else reads it: masks, or an output.
    """
    for node in list(model.graph):
        if node.op_type == "If":
            _inline(model.graph, node, masks)
    common_passes.RemoveUnusedNodesPass()(model)
    common_passes.NameFixPass()(model)
    return model


def weights_in_branches(model: ir.Model) -> ir.Model:
    """Move what only one branch reads into it, so that its `If` hands over less. Changes `model`, and returns it."""
    initializers = model.graph.initializers
    for node in model.graph:
        for branch in _branches(node):
            for value in {value for inner in branch for value in inner.inputs if value is not None}:
                only_here = {use.node.graph for use in value.uses()} == {branch}
                if initializers.get(str(value.name)) is value and only_here:
                    del initializers[str(value.name)]
                    branch.initializers[str(value.name)] = value
    return model


def save_beside(model: ir.Model, folder: Path) -> None:
    """Write what a session loads into a new folder."""
    folder.mkdir()
    ir.save(model, folder / MODEL_FILE, external_data=f"{MODEL_FILE}.data")


def _branches(node: ir.Node) -> list[ir.Graph]:
    return [node.attributes[name].as_graph() for name in ("then_branch", "else_branch") if name in node.attributes]


def _inline(graph: ir.Graph, node: ir.Node, masks: bool) -> None:
    branch = node.attributes["then_branch"].as_graph()
    outputs = list(branch.outputs)
    if not masks:
        for inner in list(branch):
            if inner.op_type == "Where":  # the mask, what the block makes, what skips it
                (masked,), made = inner.outputs, inner.inputs[1]
                assert made is not None
                masked.replace_all_uses_with(made, replace_graph_outputs=True)
                outputs = [made if value is masked else value for value in outputs]
    branch.outputs.clear()
    for inner in list(branch):
        branch.remove(inner)
        graph.insert_before(node, inner)
    for value, made in zip(node.outputs, outputs, strict=True):
        if value.is_graph_output():
            made.name, value.name = value.name, f"{value.name}_of_if"
        value.replace_all_uses_with(made, replace_graph_outputs=True)
    graph.remove(node)
