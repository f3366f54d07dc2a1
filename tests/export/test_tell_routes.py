import numpy as np
import onnx_ir as ir
import pytest

from modcompile.errors import VerificationError
from modcompile.export.tell_routes import MASKED, SKIPPED, UNMASKED, TellRoutes, has_unmasked_branch
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
WITH_UNMASKED_BRANCH = """
layer (float[B, T, 1] x, bool[B, T, 1] wanted, bool needed, bool all_open) => (float[B, T, 1] y)
<int64[1] axis = {2}> {
    open = Identity(wanted)
    mask = And(open, open)
    y = If (all_open) <
        then_branch = unmasked () => (float[B, T, 1] y_all) { y_all = Add(x, x) },
        else_branch = otherwise () => (float[B, T, 1] y_other) {
            y_other = If (needed) <
                then_branch = executed () => (float[B, T, 1] y_then) { y_then = Neg(x) },
                else_branch = skipped () => (float[B, T, 1] y_else) { y_else = Identity(x) }
            >
        }
    >
    squeezed = Squeeze(mask, axis)
}
"""
MASK = np.array([[[True], [False], [False]], [[False], [False], [True]]])
ALL, NONE = np.ones_like(MASK), np.zeros_like(MASK)


ALONE = {"open": "blocks.4.decide.0", "mask": "blocks.4.decide.1"}
WITH_OTHERS = {"open": "decisions.1,2-3,4.6", "mask": "decisions.1,2-3,4.7"}


def routed_layer(decided: dict[str, str] = ALONE, *, emit_routing: bool = False, text: str = LAYER) -> ir.Model:
    """The names are those of an exported model."""
    model = model_of(text)
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
        output.shape = ir.Shape([None] * {"y": 3, "routing.4": 2, "branch.4": 0}[str(output.name)])
    x = np.ones(MASK.shape, np.float32)
    outputs = run(model, {"x": x, "wanted": mask, "needed": np.array(needed)})
    assert outputs.keys() == {"y", "routing.4", "branch.4"}
    np.testing.assert_array_equal(outputs["routing.4"], told.squeeze(2))
    assert outputs["branch.4"] == (MASKED if needed else SKIPPED)
    np.testing.assert_array_equal(outputs["y"], -x if needed else x)


@pytest.mark.parametrize("emit_routing", [False, True])
@pytest.mark.parametrize(
    ("mask", "all_open", "needed", "told", "branch"),
    [
        pytest.param(ALL, True, True, ALL, UNMASKED, id="without masks"),
        pytest.param(MASK, False, True, MASK, MASKED, id="executed for some"),
        pytest.param(NONE, False, False, NONE, SKIPPED, id="skipped"),
        pytest.param(MASK, True, True, ALL, UNMASKED, id="without masks though not all were wanted"),
        pytest.param(ALL, False, True, ALL, MASKED, id="with masks though all were wanted"),
        pytest.param(ALL, False, False, NONE, SKIPPED, id="skipped though all were wanted"),
    ],
)
def test_tells_of_three_branches(
    mask: np.ndarray, all_open: bool, needed: bool, told: np.ndarray, branch: int, emit_routing: bool
) -> None:
    model = routed_layer(emit_routing=emit_routing, text=WITH_UNMASKED_BRANCH)
    node = next(node for node in model.graph if node.op_type == "If")
    next(iter(node.attributes["else_branch"].as_graph())).name = "blocks.4.else_branch.if"
    TellRoutes([range(4, 5)])(model)
    for output in model.graph.outputs:
        output.shape = ir.Shape([None] * {"y": 3, "routing.4": 2, "branch.4": 0}[str(output.name)])
    x = np.ones(MASK.shape, np.float32)
    feeds = {"x": x, "wanted": mask, "needed": np.array(needed), "all_open": np.array(all_open)}
    outputs = run(model, feeds)
    np.testing.assert_array_equal(outputs["routing.4"], told.squeeze(2))
    assert outputs["branch.4"] == branch
    np.testing.assert_array_equal(outputs["y"], {UNMASKED: x + x, MASKED: -x, SKIPPED: x}[branch])


@pytest.mark.parametrize(("text", "expected"), [(LAYER, False), (WITH_UNMASKED_BRANCH, True)])
def test_sees_whether_there_is_an_unmasked_branch(text: str, expected: bool) -> None:
    model = routed_layer(text=text)
    assert has_unmasked_branch(model, range(4, 5)) == expected
    assert not has_unmasked_branch(model, range(3, 5))


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
