import numpy as np
import onnx_ir as ir
import pytest

from modcompile.errors import VerificationError
from modcompile.export.tell_routes import TellRoutes
from tests.export.onnx_text import model_of, operators, run

LAYER = """
layer (float[B, T, 1] x, bool[B, T, 1] wanted, bool needed) => (float[B, T, 1] y) <int64[1] axis = {2}> {
    open = Identity(wanted)
    mask = And(open, open)
    y = If (needed) <
        then_branch = executed () => (float[B, T, 1] y_then) { y_then = Neg(x) },
        else_branch = skipped () => (float[B, T, 1] y_else) { y_else = Identity(x) }
    >
    squeezed = Squeeze(mask, axis)
}
"""
MASK = np.array([[[True], [False], [False]], [[False], [False], [True]]])
ALL, NONE = np.ones_like(MASK), np.zeros_like(MASK)


ALONE = {"open": "blocks.4.decide.0", "mask": "blocks.4.decide.1"}
WITH_OTHERS = {"open": "decisions.1,2-3,4.6", "mask": "decisions.1,2-3,4.7"}


def routed_layer(decided: dict[str, str] = ALONE, *, emit_routing: bool = False) -> ir.Model:
    """The names are those of an exported model."""
    model = model_of(LAYER)
    for node in model.graph:
        if node.op_type == "If":
            node.name = "blocks.4.if"
        if (name := str(node.outputs[0].name)) in decided:
            node.outputs[0].name = decided[name]
        if node.op_type == "Squeeze" and emit_routing:
            (routing,) = node.outputs
            routing.name, routing.type = "routing.4", ir.TensorType(ir.DataType.BOOL)
            routing.shape = ir.Shape(["B", "T"])
            model.graph.outputs.append(routing)
    return model


@pytest.mark.parametrize("decided", [ALONE, WITH_OTHERS], ids=["alone", "with others"])
@pytest.mark.parametrize("emit_routing", [False, True])
@pytest.mark.parametrize(
    ("mask", "needed", "told"),
    [
        pytest.param(MASK, True, MASK, id="executed for some"),
        pytest.param(ALL, True, ALL, id="executed for all"),
        pytest.param(NONE, False, NONE, id="skipped"),
        pytest.param(NONE, True, ALL, id="executed though nothing was wanted"),
        pytest.param(MASK, False, NONE, id="skipped though something was wanted"),
    ],
)
def test_tells_what_was_done(
    mask: np.ndarray, needed: bool, told: np.ndarray, emit_routing: bool, decided: dict[str, str]
) -> None:
    model = routed_layer(decided, emit_routing=emit_routing)
    assert TellRoutes([range(4, 5)])(model).modified
    for output in model.graph.outputs:
        output.shape = ir.Shape([None] * (3 if output.name == "y" else 2))
    x = np.ones(MASK.shape, np.float32)
    outputs = run(model, {"x": x, "wanted": mask, "needed": np.array(needed)})
    assert outputs.keys() == {"y", "routing.4"}
    np.testing.assert_array_equal(outputs["routing.4"], told.squeeze(2))
    np.testing.assert_array_equal(outputs["y"], -x if needed else x)


def test_adds_no_operators_outside_the_branches_but_a_squeeze() -> None:
    model = routed_layer()
    before = len(model.graph)
    TellRoutes([range(4, 5)])(model)
    assert [node.op_type for node in model.graph][before:] == ["Constant", "Squeeze"]
    assert operators(model.graph).count("If") == 1


@pytest.mark.parametrize("name", ["blocks.4.if", "blocks.4.decide.0"])
def test_refuses_a_layer_without_an_if_of_its_own(name: str) -> None:
    model = routed_layer()
    for node in model.graph:
        if node.name == name:
            node.name = "other"
        if node.outputs[0].name == name:
            node.outputs[0].name = "other"
    with pytest.raises(VerificationError, match=r"^layer 4 has no If of its own$"):
        TellRoutes([range(4, 5)])(model)
