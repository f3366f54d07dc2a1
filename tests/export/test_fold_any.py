import numpy as np
import onnx_ir as ir
import pytest

from modcompile.export.fold_any import FoldAny
from tests.export.onnx_text import assert_left_alone, assert_same, operators, rewritten

ANY = """
any (bool[B, T, 1] mask) => (bool needed) {
    numbers = Cast<to=7>(mask)
    largest = ReduceMax<keepdims=0>(numbers)
    needed = Cast<to=9>(largest)
}
"""


@pytest.mark.parametrize("reduction", ["ReduceMax", "ReduceMin"])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_reduces_booleans_as_booleans(share: float, reduction: str) -> None:
    graph = ANY.replace("ReduceMax", reduction)
    model = rewritten(graph, FoldAny())
    ir.passes.common.RemoveUnusedNodesPass()(model)
    assert operators(model.graph) == [reduction]
    assert_same(model, graph, {"mask": np.random.default_rng(0).random((2, 5, 1)) < share})


@pytest.mark.parametrize("dtype", [1, 6, 7], ids=["float", "int32", "int64"])
def test_folds_whatever_type_lies_between(dtype: int) -> None:
    graph = ANY.replace("to=7", f"to={dtype}")
    assert_same(rewritten(graph, FoldAny()), graph, {"mask": np.ones((1, 1, 1), bool)})


def test_keeps_axes() -> None:
    graph = """
    any (bool[B, T, 1] mask) => (bool[B, 1] needed) <int64[1] axes = {1}> {
        numbers = Cast<to=7>(mask)
        largest = ReduceMax<keepdims=0>(numbers, axes)
        needed = Cast<to=9>(largest)
    }
    """
    model = rewritten(graph, FoldAny())
    assert_same(model, graph, {"mask": np.array([[[True], [False]], [[False], [False]]])})


def test_readers_of_the_result_read_the_reduction() -> None:
    graph = ANY.replace("=> (bool needed)", "=> (bool idle)").replace("}", "    idle = Not(needed)\n}")
    model = rewritten(graph, FoldAny())
    ir.passes.common.RemoveUnusedNodesPass()(model)
    assert operators(model.graph) == ["ReduceMax", "Not"]
    assert_same(model, graph, {"mask": np.zeros((1, 2, 1), bool)})


@pytest.mark.parametrize(
    ("old", "new"),
    [
        pytest.param("bool[B, T, 1]", "float[B, T, 1]", id="numbers to begin with"),
        pytest.param("=> (bool needed)", "=> (bool needed, int64 largest)", id="the number is returned"),
        pytest.param("}", "    other = Neg(largest)\n}", id="the number is read"),
        pytest.param("to=9", "to=6", id="a number is wanted"),
        pytest.param("ReduceMax", "ReduceSum", id="another reduction"),
    ],
)
def test_leaves_alone_what_needs_the_number(old: str, new: str) -> None:
    graph = ANY.replace(old, new)
    if "to=6" in graph:
        graph = graph.replace("=> (bool needed)", "=> (int32 needed)")
    assert_left_alone(graph, FoldAny())


def test_leaves_alone_a_reduction_of_an_input() -> None:
    assert_left_alone("any (bool[B] mask) => (bool needed) { needed = ReduceMax<keepdims=0>(mask) }", FoldAny())
