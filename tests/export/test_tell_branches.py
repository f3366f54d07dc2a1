import numpy as np
import onnx_ir as ir
import pytest

from modcompile.errors import VerificationError
from modcompile.export.tell_branches import TellBranches
from tests.export.onnx_text import model_of, operators, run

TWO = """
layer (float[B, T, 1] x, bool is_0, int64[B, T, 1] asked) => (float[B, T, 1] y) {
    selection = Identity(asked)
    y = If (is_0) <
        then_branch = branch_0 () => (float[B, T, 1] y_0) { y_0 = Neg(x) },
        else_branch = branch_1 () => (float[B, T, 1] y_1) { y_1 = Exp(x) }
    >
}
"""
THREE = """
layer (float[B, T, 1] x, bool is_0, bool is_1, bool is_2, int64[B, T, 1] asked) => (float[B, T, 1] y) {
    selection = Identity(asked)
    first = If (is_0) <
        then_branch = branch_0 () => (float[B, T, 1] y_0) { y_0 = Neg(x) },
        else_branch = nothing () => (float[B, T, 1] y_nothing) { y_nothing = Sub(x, x) }
    >
    second = If (is_1) <
        then_branch = take_1 () => (float[B, T, 1] y_1) { y_1 = Exp(x) },
        else_branch = keep_1 () => (float[B, T, 1] y_first) { y_first = Identity(first) }
    >
    y = If (is_2) <
        then_branch = take_2 () => (float[B, T, 1] y_2) { y_2 = Sin(x) },
        else_branch = keep_2 () => (float[B, T, 1] y_second) { y_second = Identity(second) }
    >
}
"""
X = np.array([[[1.0], [2.0]]], np.float32)
ASKED = np.array([[[1], [0]]])
DONE = {0: -X, 1: np.exp(X), 2: np.sin(X), -1: 0 * X}


def layer(text: str, count: int) -> ir.Model:
    """Of so many branches; the names are those of an exported model."""
    model = model_of(text)
    conditionals = 0
    for node in model.graph:
        if node.op_type == "If":
            node.name = f"blocks.4.if_{conditionals}" if conditionals else "blocks.4.if"
            conditionals += 1
        else:
            (selection,) = node.outputs
            selection.name, selection.type = f"blocks.4.decide.{count + 1}", ir.TensorType(ir.DataType.INT64)
    return model


def told(model: ir.Model, count: int, conditions: tuple[bool, ...]) -> int:
    """The branch that the graph tells, once its result is found to be that of the branch."""
    assert TellBranches({4: count}, frozenset([4]))(model).modified
    for output in model.graph.outputs:
        if output.name == "selection.4":
            output.shape = ir.Shape(["B", "T", 1])
    feeds = {f"is_{index}": np.array(condition) for index, condition in enumerate(conditions)}
    outputs = run(model, {"x": X, "asked": ASKED, **feeds})
    assert outputs.keys() == {"y", "branch.4", "selection.4"}
    np.testing.assert_array_equal(outputs["selection.4"], ASKED)
    branch = outputs["branch.4"]
    assert branch.dtype == np.int64
    assert branch.shape == ()
    np.testing.assert_allclose(outputs["y"], DONE[int(branch)], rtol=1e-6)
    return int(branch)


@pytest.mark.parametrize(("is_0", "expected"), [(True, 0), (False, 1)])
def test_two_branches_share_an_if(is_0: bool, expected: int) -> None:
    assert told(layer(TWO, 2), 2, (is_0,)) == expected


@pytest.mark.parametrize("expected", range(3))
def test_three_have_one_each(expected: int) -> None:
    assert told(layer(THREE, 3), 3, tuple(index == expected for index in range(3))) == expected


@pytest.mark.parametrize(
    ("conditions", "expected"),
    [
        pytest.param((True, True, False), 1, id="the later of two"),
        pytest.param((True, False, True), 2, id="the last of two"),
        pytest.param((True, True, True), 2, id="the last of all"),
        pytest.param((False, False, False), -1, id="none"),
    ],
)
def test_tells_what_was_done(conditions: tuple[bool, ...], expected: int) -> None:
    """And not what a decision, which asks for one branch, would have asked for."""
    assert told(layer(THREE, 3), 3, conditions) == expected


@pytest.mark.parametrize("swapped", [0, 1, 2])
def test_tells_of_an_if_whose_branches_are_swapped(swapped: int) -> None:
    model = layer(THREE, 3)
    conditional = [node for node in model.graph if node.op_type == "If"][swapped]
    then_branch, else_branch = (conditional.attributes[f"{side}_branch"].as_graph() for side in ("then", "else"))
    conditional.attributes["then_branch"] = ir.AttrGraph("then_branch", else_branch)
    conditional.attributes["else_branch"] = ir.AttrGraph("else_branch", then_branch)
    TellBranches({4: 3}, frozenset())(model)
    conditions = {f"is_{index}": np.array(index == swapped) for index in range(3)}
    outputs = run(model, {"x": X, "asked": ASKED, **conditions})
    # The then side tells its index wherever it stands: the logits are what gives a swap away.
    assert int(outputs["branch.4"]) == swapped
    assert not np.allclose(outputs["y"], DONE[swapped])


def test_tells_no_selection_unless_asked() -> None:
    model = layer(TWO, 2)
    before = operators(model.graph)
    TellBranches({4: 2}, frozenset())(model)
    assert [value.name for value in model.graph.outputs] == ["y", "branch.4"]
    assert operators(model.graph) == [*before[:2], "Constant", before[2], "Constant", *before[3:]]


def test_no_layers_no_change() -> None:
    model = layer(TWO, 2)
    assert not TellBranches({}, frozenset())(model).modified
    assert [value.name for value in model.graph.outputs] == ["y"]


@pytest.mark.parametrize(
    ("text", "count", "missing", "message"),
    [
        (TWO, 2, "blocks.4.if", "layer 4 has not the 1 If nodes of its 2 branches"),
        (THREE, 3, "blocks.4.if", "layer 4 has not the 3 If nodes of its 3 branches"),
        (THREE, 3, "blocks.4.if_2", "layer 4 has not the 3 If nodes of its 3 branches"),
        (THREE, 3, "blocks.4.decide.4", "layer 4 has no selection of its own"),
    ],
)
def test_refuses_a_layer_without(text: str, count: int, missing: str, message: str) -> None:
    model = layer(text, count)
    for node in model.graph:
        if node.name == missing:
            node.name = "other"
        if node.outputs[0].name == missing:
            node.outputs[0].name = "other"
    with pytest.raises(VerificationError, match=f"^{message}$"):
        TellBranches({4: count}, frozenset([4]))(model)
