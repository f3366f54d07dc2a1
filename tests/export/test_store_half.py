import numpy as np
import onnx_ir as ir
import pytest

from modcompile.export.store_half import StoreHalf
from tests.export.onnx_text import assert_left_alone, assert_same, operators, rewritten

EXACT = """
project (float[B, 3] x, bool needed) => (float[B, 2] y) <float[3, 2] w = {1, 2.5, -3, 4, 0.125, 65504}> {
    y = If (needed) <
        then_branch = executed () => (float[B, 2] y_then) {
            p_then = MatMul(x, w)
            y_then = Relu(p_then)
        },
        else_branch = skipped () => (float[B, 2] y_else) { y_else = MatMul(x, w) }
    >
}
"""
ONCE = "project (float[B, 2] x) => (float[B, 1] y) <float[2, 1] w = {1, 2}> { y = MatMul(x, w) }"


@pytest.mark.parametrize("needed", [True, False])
def test_stores_a_weight_that_both_branches_read_in_half(needed: bool) -> None:
    model = rewritten(EXACT, StoreHalf())
    assert operators(model.graph) == ["Cast", "MatMul", "Relu", "MatMul", "If"]
    (half,) = model.graph.initializers.values()
    assert half.dtype == ir.DataType.FLOAT16
    assert half.const_value is not None
    assert half.const_value.nbytes == 2 * 6
    np.testing.assert_array_equal(half.const_value.numpy(), [[1, 2.5], [-3, 4], [0.125, 65504]])
    x = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    assert_same(model, EXACT, {"x": x, "needed": np.array(needed)})


@pytest.mark.parametrize(
    "graph",
    [
        pytest.param(ONCE.replace("{1, 2}", "{1, 0.1}"), id="loses digits"),
        pytest.param(ONCE.replace("{1, 2}", "{1, 65536}"), id="too large"),
        pytest.param(ONCE.replace("[2, 1] w", "[2] w").replace("[B, 1] y", "[B] y"), id="a vector"),
        pytest.param(ONCE.replace("x)", "x, float[2, 1] w)", 1), id="an optional input"),
    ],
)
def test_leaves_what_half_does_not_hold_or_a_session_may_override(graph: str) -> None:
    assert_left_alone(graph, StoreHalf())
