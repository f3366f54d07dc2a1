"""Tell, as outputs of a graph, which branch every `If` took, and for which tokens.

Before::

    open, routing_mask, needed = …
    hidden, key, value = If(needed, then_branch = { … }, else_branch = { … })

After::

    hidden, key, value, told, branch = If(needed,
        then_branch = { …  told = Or(open, Not(ReduceMax(open)));  branch = 1 },
        else_branch = { …  told = And(open, false);  branch = 0 })
    routing.{layers} = Squeeze(told, 2)
    branch.{layers} = branch

Where there is an unmasked branch, these are in its else_branch, and it tells that it ran for all tokens, and 2.

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

BRANCH = "branch."
_THEN, _ELSE = "then_branch", "else_branch"
SKIPPED, MASKED, UNMASKED = range(3)
"""What branches tell of themselves."""


def has_unmasked_branch(model: ir.Model, layers: range) -> bool:
    """Whether the gate of these layers chooses between three branches."""
    conditional = _conditionals(model.graph).get(f"blocks.{name_of(layers)}.if")
    return conditional is not None and bool(_conditionals(conditional.attributes[_ELSE].as_graph()))


@dataclass(frozen=True)
class TellRoutes(ir.passes.InPlacePass):
    """Add `routing.{layers}` (bool `[B, T]`) for each gate, or have what has this name tell what was done.

    And `branch.{layers}` (int64 `[]`), always. `gated_layers` are the layers that each gate executes or skips together.

    Raises:
        VerificationError: a gate has no `If`, or no decision, of its own.
    """

    gated_layers: Sequence[range]

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        nodes = _conditionals(model.graph)
        values = {value.name: value for node in model.graph for value in node.outputs}
        names = {value.name for value in model.graph.outputs}
        restore = values.get(RESTORE)  # where each token came from, if the graph has aligned its rows
        for layers in map(name_of, self.gated_layers):
            conditional = nodes.get(f"blocks.{layers}.if")
            is_open, mask = (values.get(name) for name in _decided(layers, values))
            if conditional is None or is_open is None:
                raise VerificationError(f"layer {layers} has no If of its own")
            told, branch = _tell(conditional, is_open, f"blocks.{layers}")
            branch.name = f"{BRANCH}{layers}"
            model.graph.outputs.append(branch)
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


def _tell(conditional: ir.Node, is_open: ir.Value, name: str) -> tuple[ir.Value, ir.Value]:
    """What it tells of its tokens, and of itself, as new outputs of an `If`."""
    then_branch, else_branch = (conditional.attributes[branch].as_graph() for branch in (_THEN, _ELSE))
    inner = list(_conditionals(else_branch).values())
    if inner:
        yes = ir.Node("", "Constant", [], [ir.AttrTensor("value", ir.tensor(True))])
        _return(then_branch, [yes], ir.Node("", "Or", [is_open, yes.outputs[0]]), f"{name}.unmasked")
        _return(then_branch, [], _number(UNMASKED), f"{name}.is_unmasked")
        else_branch.outputs.extend(_tell(inner[0], is_open, f"{name}.else_branch"))
    else:
        needed = ir.Node("", "ReduceMax", [is_open], [ir.AttrInt64("keepdims", 0)])
        idle = ir.Node("", "Not", [needed.outputs[0]])
        _return(then_branch, [needed, idle], ir.Node("", "Or", [is_open, idle.outputs[0]]), f"{name}.executed")
        _return(then_branch, [], _number(MASKED), f"{name}.is_executed")
        no = ir.Node("", "Constant", [], [ir.AttrTensor("value", ir.tensor(False))])
        _return(else_branch, [no], ir.Node("", "And", [is_open, no.outputs[0]]), f"{name}.skipped")
        _return(else_branch, [], _number(SKIPPED), f"{name}.is_skipped")
    conditional.resize_outputs(len(conditional.outputs) + 2)
    told, branch = conditional.outputs[-2:]
    told.name, told.type = f"{name}.told", is_open.type
    branch.name, branch.type, branch.shape = f"{name}.branch", ir.TensorType(ir.DataType.INT64), ir.Shape([])
    return told, branch


def _conditionals(graph: ir.Graph) -> dict[str | None, ir.Node]:
    return {node.name: node for node in graph if node.op_type == "If"}


def _number(value: int) -> ir.Node:
    return ir.Node("", "Constant", [], [ir.AttrInt64("value_int", value)])


def _return(graph: ir.Graph, nodes: Sequence[ir.Node], last: ir.Node, name: str) -> None:
    for index, node in enumerate(nodes):
        node.outputs[0].name = f"{name}.{index}"
    (result,) = last.outputs
    dtype = ir.DataType.INT64 if last.op_type == "Constant" else ir.DataType.BOOL
    result.name, result.type = name, ir.TensorType(dtype)
    if last.op_type == "Constant":
        result.shape = ir.Shape([])
    graph.extend([*nodes, last])
    graph.outputs.append(result)
