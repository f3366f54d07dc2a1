import numpy as np
import onnx_ir as ir
import pytest

from modcompile.export.fold_shapes import FoldShapes
from tests.export.onnx_text import assert_left_alone, assert_same, operators, rewritten

SPLIT_HEADS = """
split (float[B, T, 36] x) => (float[B, T, 9, 4] y) <int64[2] heads = {9, 4}> {
    batch = Shape<start=0, end=1>(x)
    sequence = Shape<start=1, end=2>(x)
    shape = Concat<axis=0>(batch, sequence, heads)
    y = Reshape(x, shape)
}
"""
MERGE_GROUPS = """
merge (float[B, 2, 3, S, 8] x) => (float[B, 6, S, 8] y) <int64[1] heads = {6}> {
    batch = Shape<start=0, end=1>(x)
    rest = Shape<start=3, end=5>(x)
    shape = Concat<axis=0>(batch, heads, rest)
    y = Reshape(x, shape)
}
"""
REPEAT_GROUPS = """
repeat (float[B, 2, 1, S, 8] x) => (float[B, 2, 3, S, 8] y) <int64[1] groups = {3}> {
    before = Shape<start=0, end=2>(x)
    after = Shape<start=3, end=5>(x)
    shape = Concat<axis=0>(before, groups, after)
    y = Expand(x, shape)
}
"""
FLATTEN = """
flatten (float[B, T, 6] x) => (float[N, 6] y) <int64[1] size = {6}> {
    batch = Shape<start=0, end=1>(x)
    sequence = Shape<start=1, end=2>(x)
    tokens = Mul(batch, sequence)
    shape = Concat<axis=0>(tokens, size)
    y = Reshape(x, shape)
}
"""


@pytest.mark.parametrize(
    ("graph", "operator", "shape", "sizes"),
    [
        pytest.param(SPLIT_HEADS, "Reshape", [0, 0, 9, 4], (2, 3, 36), id="split"),
        pytest.param(SPLIT_HEADS, "Reshape", [0, 0, 9, 4], (1, 0, 36), id="split nothing"),
        pytest.param(MERGE_GROUPS, "Reshape", [0, 6, -1, 8], (2, 2, 3, 5, 8), id="merge"),
        pytest.param(REPEAT_GROUPS, "Expand", [1, 1, 3, 1, 1], (2, 2, 1, 5, 8), id="repeat"),
        pytest.param(REPEAT_GROUPS, "Expand", [1, 1, 3, 1, 1], (1, 2, 1, 0, 8), id="repeat nothing"),
        pytest.param(FLATTEN, "Reshape", [-1, 6], (4, 3, 6), id="flatten"),
    ],
)
def test_writes_shapes_down(graph: str, operator: str, shape: list[int], sizes: tuple[int, ...]) -> None:
    model = rewritten(graph, FoldShapes())
    ir.passes.common.RemoveUnusedNodesPass()(model)
    assert operators(model.graph) == [operator]
    written = model.graph[0].inputs[1]
    assert written is not None and written.const_value is not None
    assert written.const_value.numpy().tolist() == shape
    assert_same(model, graph, {"x": np.random.default_rng(0).random(sizes, np.float32)})


def test_equal_shapes_are_one_constant() -> None:
    graph = """
    twice (float[B, T, 6] x, float[B, T, 6] z) => (float[B, T, 2, 3] y, float[B, T, 2, 3] w) <int64[2] heads = {2, 3}> {
        sizes = Shape<start=0, end=2>(x)
        shape = Concat<axis=0>(sizes, heads)
        y = Reshape(x, shape)
        w = Reshape(z, shape)
    }
    """
    model = rewritten(graph, FoldShapes())
    readers = [node for node in model.graph if node.op_type == "Reshape"]
    assert readers[0].inputs[1] is readers[1].inputs[1]
    sample = np.arange(24, dtype=np.float32).reshape(2, 2, 6)
    assert_same(model, graph, {"x": sample, "z": -sample})


def test_a_size_of_one_is_not_taken_for_a_dimension_that_stays() -> None:
    """[B, 1, 6] → [B, 6, 1]: the second dimension changes, though it is known in both."""
    graph = """
    turn (float[B, 1, 6] x) => (float[B, 6, 1] y) <int64[2] tail = {6, 1}> {
        batch = Shape<start=0, end=1>(x)
        shape = Concat<axis=0>(batch, tail)
        y = Reshape(x, shape)
    }
    """
    model = rewritten(graph, FoldShapes())
    assert_same(model, graph, {"x": np.arange(12, dtype=np.float32).reshape(2, 1, 6)})


@pytest.mark.parametrize(
    "graph",
    [
        pytest.param(
            "two (float[B, T, 6] x, int64[3] shape) => (float[M, N, 6] y) { y = Reshape(x, shape) }",
            id="two unknown dimensions",
        ),
        pytest.param(
            "moved (float[B, T, 6] x, int64[3] shape) => (float[T, B, 6] y) { y = Reshape(x, shape) }",
            id="dimensions that change places",
        ),
        pytest.param(
            "empty (float[B, T, 6] x, int64[3] shape) => (float[B, 0, 6] y) { y = Reshape(x, shape) }",
            id="a dimension of 0, which would say that it stays",
        ),
        pytest.param(
            "mystery (float[B, T, 6] x, int64[n] shape) => (float[B] z) { y = Reshape(x, shape) z = ReduceMax(y) }",
            id="a shape that nobody knows",
        ),
        pytest.param(
            "grown (float[B, 1] x, int64[2] shape) => (float[B, S] y) { y = Expand(x, shape) }",
            id="an expansion to an unknown size",
        ),
        pytest.param(
            "constant (float[B, 6] x) => (float[B, 2, 3] y) <int64[3] s = {-1, 2, 3}> { y = Reshape(x, s) }",
            id="a constant already",
        ),
    ],
)
def test_leaves_alone_what_is_not_known(graph: str) -> None:
    assert_left_alone(graph, FoldShapes())
