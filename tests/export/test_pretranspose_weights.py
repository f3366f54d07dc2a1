import numpy as np
import onnx_ir as ir
import pytest

from modcompile.export.pretranspose_weights import PretransposeWeights
from tests.export.onnx_text import Arrays, assert_left_alone, assert_same, model_of, operators, rewritten

BOTH_BRANCHES = """
project (float[B, 3] x, bool needed) => (float[B, 2] y) <float[2, 3] w = {1, 2, 3, 4, 5, 6}> {
    y = If (needed) <
        then_branch = executed () => (float[B, 2] y_then) {
            t_then = Transpose<perm=[1, 0]>(w)
            p_then = MatMul(x, t_then)
            y_then = Relu(p_then)
        },
        else_branch = skipped () => (float[B, 2] y_else) {
            t_else = Transpose<perm=[1, 0]>(w)
            y_else = MatMul(x, t_else)
        }
    >
}
"""
ONCE = """
project (float[B, 3] x) => (float[B, 2] y) <float[2, 3] w = {1, 2, 3, 4, 5, 6}> {
    t = Transpose<perm=[1, 0]>(w)
    y = MatMul(x, t)
}
"""


def feeds(**more: np.ndarray) -> Arrays:
    return {"x": np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32), **more}


@pytest.mark.parametrize("needed", [True, False])
def test_both_branches_multiply_by_one_transposed_weight(needed: bool) -> None:
    model = rewritten(BOTH_BRANCHES, PretransposeWeights())
    assert operators(model.graph) == ["MatMul", "Relu", "MatMul", "If"]
    weight = model.graph.initializers["w"]
    assert len(weight.uses()) == 2
    assert weight.const_value is not None
    np.testing.assert_array_equal(weight.const_value.numpy(), [[1, 4], [2, 5], [3, 6]])
    assert_same(model, BOTH_BRANCHES, feeds(needed=np.array(needed)))


@pytest.mark.parametrize(
    "graph",
    [
        pytest.param(ONCE.replace("y = ", "e = Gather(w, i) y = ").replace("x)", "x, int64[1] i)", 1), id="tied"),
        pytest.param(ONCE.replace("[1, 0]", "[0, 1]").replace("[2, 3]", "[3, 2]"), id="transposed to itself"),
        pytest.param(ONCE.replace("<perm=[1, 0]>", ""), id="no permutation given"),
        pytest.param(ONCE.replace("float[B, 3] x", "float[B, 3] x, float[2, 3] w"), id="a session may override it"),
        pytest.param(
            ONCE.replace("=> (", "=> (float[3, 2] t, ").replace("[B, 2] y)", "[B, 2] y)"),
            id="the transpose is returned",
        ),
        pytest.param("unused (float[B, 3] x) => (float[B, 3] y) <float[1, 1] w = {1}> { y = Relu(x) }", id="unused"),
        pytest.param(
            """
            stacked (float[4, B, 1] x) => (float[4, B, 2] y) <float[4, 2, 1] w = {1, 2, 3, 4, 5, 6, 7, 8}> {
                t = Transpose<perm=[0, 2, 1]>(w)
                y = MatMul(x, t)
            }
            """,
            id="more than two dimensions",
        ),
    ],
)
def test_leaves_alone_what_is_read_as_it_is(graph: str) -> None:
    assert_left_alone(graph, PretransposeWeights())


def test_holds_no_copy_of_a_weight() -> None:
    model, weight = model_of(ONCE), np.array([[1, 2, 3], [4, 5, 6]], np.float32)
    model.graph.initializers["w"].const_value = ir.tensor(weight, name="w")
    PretransposeWeights()(model)
    stored = model.graph.initializers["w"].const_value
    assert stored is not None
    weight *= 10
    np.testing.assert_array_equal(stored.numpy(), weight.T)
    assert stored.tobytes() == weight.T.tobytes()
