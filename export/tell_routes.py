"""Tell, as outputs of a graph, which branch every `If` took, and for which tokens.

Before::

    open, routing_mask, needed = …
    hidden, key, value = If(needed, then_branch = { … }, else_branch = { … })

After::

    hidden, key, value, told = If(needed,
        then_branch = { …  told = Or(open, Not(ReduceMax(open))) },
        else_branch = { …  told = And(open, false) })
    routing.{layers} = Squeeze(told, 2)

What is told is made inside the branches, so it is what was done and not what was asked for: a layer that ran although
no token needed it tells that it ran for all of them, and one that was skipped tells that it ran for none.
Padding, too, is told of as what was done with it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from modcompile.errors import VerificationError
from modcompile.layer_ranges import name_of
from modcompile.passes.align_rows import RESTORE
from modcompile.passes.join_decisions import DECISIONS, NUM_DECIDED


@dataclass(frozen=True)
class TellRoutes(ir.passes.InPlacePass):
    """Add `routing.{layers}` (bool `[B, T]`) for each gate, or have what has this name tell what was done.

    `gated_layers` are the layers that each gate executes or skips together.

    Raises:
        VerificationError: a gate has no `If`, or no decision, of its own.
    """

    gated_layers: Sequence[range]

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        nodes = {node.name: node for node in model.graph if node.op_type == "If"}
        values = {value.name: value for node in model.graph for value in node.outputs}
        names = {value.name for value in model.graph.outputs}
        restore = values.get(RESTORE)  # where each token came from, if the graph has aligned its rows
        for layers in map(name_of, self.gated_layers):
            conditional = nodes.get(f"blocks.{layers}.if")
            is_open, mask = (values.get(name) for name in _decided(layers, values))
            if conditional is None or is_open is None:
                raise VerificationError(f"layer {layers} has no If of its own")
            told = _tell(conditional, is_open, f"blocks.{layers}.told")
            for node, index in mask.uses() if mask is not None else ():
                node.replace_input_with(index, told)
            if f"routing.{layers}" not in names:
                axis = ir.Node("", "Constant", [], [ir.AttrInt64s("value_ints", [2])])
                last = ir.Node("", "Squeeze", [told, axis.outputs[0]])
                before = [axis]
                if restore is not None:
                    before.append(last)
                    last = ir.Node("", "GatherElements", [last.outputs[0], restore], [ir.AttrInt64("axis", 1)])
                _return(model.graph, before, last, f"routing.{layers}")
        return ir.passes.PassResult(model, modified=bool(self.gated_layers))


def _decided(layers: str, names: Iterable[str | None]) -> tuple[str, str]:
    """The names of `is_open` and `routing_mask`, whether the gate is decided by itself or with others."""
    for decision in {str(name).rpartition(".")[0] for name in names}:
        gates = decision.removeprefix(DECISIONS).split(",")
        if decision.startswith(DECISIONS) and layers in gates:
            first = gates.index(layers) * NUM_DECIDED
            return f"{decision}.{first}", f"{decision}.{first + 1}"
    return f"blocks.{layers}.decide.0", f"blocks.{layers}.decide.1"


def _tell(conditional: ir.Node, is_open: ir.Value, name: str) -> ir.Value:
    then_branch, else_branch = (conditional.attributes[branch].as_graph() for branch in ("then_branch", "else_branch"))
    needed = ir.Node("", "ReduceMax", [is_open], [ir.AttrInt64("keepdims", 0)])
    idle = ir.Node("", "Not", [needed.outputs[0]])
    _return(then_branch, [needed, idle], ir.Node("", "Or", [is_open, idle.outputs[0]]), f"{name}.executed")
    no = ir.Node("", "Constant", [], [ir.AttrTensor("value", ir.tensor(False))])
    _return(else_branch, [no], ir.Node("", "And", [is_open, no.outputs[0]]), f"{name}.skipped")
    conditional.resize_outputs(len(conditional.outputs) + 1)
    told = conditional.outputs[-1]
    told.name, told.type = name, is_open.type
    return told


def _return(graph: ir.Graph, nodes: Sequence[ir.Node], last: ir.Node, name: str) -> None:
    for index, node in enumerate(nodes):
        node.outputs[0].name = f"{name}.{index}"
    (result,) = last.outputs
    result.name, result.type = name, ir.TensorType(ir.DataType.BOOL)
    graph.extend([*nodes, last])
    graph.outputs.append(result)
