import numpy as np
import pytest

from modcompile.export.hoist_shared import HoistShared
from tests.export.onnx_text import Arrays, assert_left_alone, assert_same, model_of, operators, rewritten

LAYERS = """
layers (float[B, T, 4] x, float[B, T] angle, bool first, bool second) => (float[B, T, 4] z)
<int64[1] axis = {2}, float[4] w0 = {1, 2, 3, 4}, float[4] w1 = {5, 6, 7, 8}> {
    cos = Cos(angle)
    y = If (first) <
        then_branch = first_then () => (float[B, T, 4] y_then) {
            c0 = Unsqueeze(cos, axis)
            s0 = Mul(c0, c0)
            p0 = Mul(x, s0)
            y_then = Mul(p0, w0)
        },
        else_branch = first_else () => (float[B, T, 4] y_else) { y_else = Identity(x) }
    >
    z = If (second) <
        then_branch = second_then () => (float[B, T, 4] z_then) {
            c1 = Unsqueeze(cos, axis)
            s1 = Mul(c1, c1)
            p1 = Mul(y, s1)
            z_then = Mul(p1, w1)
        },
        else_branch = second_else () => (float[B, T, 4] z_else) { z_else = Identity(y) }
    >
}
"""


def feeds(first: bool = True, second: bool = True) -> Arrays:
    generator = np.random.default_rng(0)
    return {
        "x": generator.normal(size=(2, 3, 4)).astype(np.float32),
        "angle": generator.normal(size=(2, 3)).astype(np.float32),
        "first": np.array(first),
        "second": np.array(second),
    }


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("second", [True, False])
def test_computes_once_what_branches_share(first: bool, second: bool) -> None:
    model = rewritten(LAYERS, HoistShared())
    branch = ["Mul", "Mul", "Identity", "If"]
    assert operators(model.graph) == ["Cos", "Unsqueeze", "Mul", *branch, *branch]
    assert_same(model, LAYERS, feeds(first, second))


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("inner", [True, False])
def test_computes_once_what_branches_in_branches_share(first: bool, inner: bool) -> None:
    """The second is one deeper, and reads what the branch around it has made, too."""
    body = LAYERS[LAYERS.index("c1 =") : LAYERS.index("        },\n        else_branch = second_else")]
    nested = f"""x1 = Neg(y)
            z_then = If (inner) <
                then_branch = inner_then () => (float[B, T, 4] z_inner) {{
                    {body.replace("z_then", "z_inner").replace("Mul(y, s1)", "Mul(x1, s1)")}
                }},
                else_branch = inner_else () => (float[B, T, 4] z_other) {{ z_other = Identity(y) }}
            >
"""
    graph = LAYERS.replace(body, nested).replace("bool second)", "bool second, bool inner)")
    model = rewritten(graph, HoistShared())
    outer, inner_branch = ["Mul", "Mul", "Identity", "If"], ["Mul", "Mul", "Identity", "If"]
    assert operators(model.graph) == ["Cos", "Unsqueeze", "Mul", *outer, "Neg", *inner_branch, "Identity", "If"]
    assert_same(model, graph, {**feeds(first), "inner": np.array(inner)})


def test_two_branches_may_have_used_one_name() -> None:
    graph = LAYERS.replace("s1 = Mul(c1, c1)", "s1 = Add(c1, c1)")
    for name in "csp":
        graph = graph.replace(f"{name}0", name).replace(f"{name}1", name)
    model = rewritten(graph, HoistShared())
    assert sorted(operators(model.graph)[:4]) == ["Add", "Cos", "Mul", "Unsqueeze"]
    assert_same(model, graph, feeds())


def test_leaves_what_depends_on_one_layer_where_it_may_be_skipped() -> None:
    model = rewritten(LAYERS, HoistShared())
    for node in model.graph:
        if node.op_type == "If":
            assert operators(node.attributes["then_branch"].as_graph()) == ["Mul", "Mul"]


def test_leaves_the_product_with_a_weight_of_one_layer_where_it_may_be_skipped() -> None:
    graph = LAYERS.replace("p0 = Mul(x, s0)", "q0 = Mul(s0, w0) p0 = Mul(x, q0)")
    model = rewritten(graph, HoistShared())
    branches = [operators(node.attributes["then_branch"].as_graph()) for node in model.graph if node.op_type == "If"]
    assert branches == [["Mul", "Mul", "Mul"], ["Mul", "Mul"]]
    assert_same(model, graph, feeds())


def test_leaves_what_the_chain_of_one_layer_reads_where_it_may_be_skipped() -> None:
    model = model_of(LAYERS)
    chain = [node for node in model.graph if node.op_type == "If"]
    for node, name in zip(chain, ("blocks.0.if", "blocks.0.if_1"), strict=True):
        node.name = name
    assert not HoistShared()(model).modified
    chain[1].name = "blocks.1.if"
    assert HoistShared()(model).modified


def test_leaves_the_results_of_branches_in_them() -> None:
    graph = """
    results (float[B] x, bool first, bool second) => (float[B] y, float[B] z) {
        cos = Cos(x)
        y = If (first) <
            then_branch = first_then () => (float[B] y_then) { y_then = Neg(cos) },
            else_branch = first_else () => (float[B] y_else) { y_else = Abs(cos) }
        >
        z = If (second) <
            then_branch = second_then () => (float[B] z_then) { z_then = Neg(cos) },
            else_branch = second_else () => (float[B] z_else) { z_else = Abs(cos) }
        >
    }
    """
    assert_left_alone(graph, HoistShared())


@pytest.mark.parametrize(
    ("old", "new"),
    [
        pytest.param("c1 = Unsqueeze(cos, axis)", "c1 = Unsqueeze(angle, axis)", id="read by one If only"),
        pytest.param("Unsqueeze(cos, axis)", "Unsqueeze(angle, axis)", id="an input"),
        pytest.param("bool second)", "bool second, int64[1] axis)", id="an optional input"),
    ],
)
def test_leaves_alone_what_is_not_shared(old: str, new: str) -> None:
    assert_left_alone(LAYERS.replace(old, new), HoistShared())


def test_leaves_a_model_without_ifs_alone() -> None:
    assert_left_alone("plain (float[B] x) => (float[B] y) { a = Cos(x) y = Neg(a) }", HoistShared())
