"""Tell, as outputs of a graph, which version of every block ran, and what each token had selected.

Before::

    hidden, key, value = If(is_0, branch_0, nothing)
    hidden, key, value = If(is_1, take_1 = { … }, keep = { … })

After::

    hidden, key, value, told_0 = If(is_0, branch_0 = { …  told = 0 }, nothing = { …  told = -1 })
    hidden, key, value, told_1 = If(is_1, take_1 = { …  told = 1 }, keep = { …  told = told_0 })
    branch.{layer} = told_1      # int64 []
    selection.{layer} = the last output of the layer's decision, where its branches read it

What is told is made inside the branches, so it is what was done and not what was asked for.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from modcompile.errors import VerificationError

BRANCH, SELECTION = "branch.", "selection."


@dataclass(frozen=True)
class TellBranches(ir.passes.InPlacePass):
    """Add `branch.{layer}` and, for layers that select, `selection.{layer}`.

    Raises:
        VerificationError: a layer has not as many `If` nodes as its branches need, or no selection.
    """

    branches: Mapping[int, int]
    """How many branches each layer has: two share one `If`, more have one each."""
    selecting: frozenset[int]

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        nodes = {node.name: node for node in model.graph if node.op_type == "If"}
        values = {value.name: value for node in model.graph for value in node.outputs}
        for layer, count in self.branches.items():
            names = [f"blocks.{layer}.if", *(f"blocks.{layer}.if_{index}" for index in range(1, count))]
            names = names[: 1 if count == 2 else count]
            if any(name not in nodes for name in names):
                raise VerificationError(f"layer {layer} has not the {len(names)} If nodes of its {count} branches")
            told = _tell([nodes[name] for name in names], f"{BRANCH}{layer}")
            model.graph.outputs.append(told)
            if layer in self.selecting:
                selection = values.get(f"blocks.{layer}.decide.{count + 1}")
                if selection is None:
                    raise VerificationError(f"layer {layer} has no selection of its own")
                copy = ir.Node("", "Identity", [selection])
                copy.outputs[0].name, copy.outputs[0].type = f"{SELECTION}{layer}", selection.type
                model.graph.append(copy)
                model.graph.outputs.append(copy.outputs[0])
        return ir.passes.PassResult(model, modified=bool(self.branches))


def _tell(chain: list[ir.Node], name: str) -> ir.Value:
    told: ir.Value | None = None
    for index, conditional in enumerate(chain):
        then_branch, else_branch = (
            conditional.attributes[branch].as_graph() for branch in ("then_branch", "else_branch")
        )
        _return(then_branch, _constant(index), f"{name}.then_{index}")
        if told is not None:
            _return(else_branch, ir.Node("", "Identity", [told]), f"{name}.else_{index}")
        else:
            _return(else_branch, _constant(1 if len(chain) == 1 else -1), f"{name}.else_{index}")
        conditional.resize_outputs(len(conditional.outputs) + 1)
        told = conditional.outputs[-1]
        told.name = name if index == len(chain) - 1 else f"{name}.{index}"
        told.type, told.shape = ir.TensorType(ir.DataType.INT64), ir.Shape([])
    assert told is not None
    return told


def _constant(value: int) -> ir.Node:
    return ir.Node("", "Constant", [], [ir.AttrInt64("value_int", value)])


def _return(graph: ir.Graph, node: ir.Node, name: str) -> None:
    (result,) = node.outputs
    result.name, result.type, result.shape = name, ir.TensorType(ir.DataType.INT64), ir.Shape([])
    graph.append(node)
    graph.outputs.append(result)
