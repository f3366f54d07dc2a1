import numpy as np
import onnx_ir as ir
import pytest

from modcompile.export.float_activations import FloatActivations
from tests.export.onnx_text import run

ROWS, SIZE = 8, 32
_RANDOM = np.random.default_rng(0)
CODES = _RANDOM.integers(0, 16, (ROWS, SIZE))
SCALES = _RANDOM.normal(size=(ROWS, 1)).astype(np.float32)
X = _RANDOM.normal(size=(3, SIZE)).astype(np.float32)
EXACT = X @ ((CODES - 8) * SCALES).T


def products() -> ir.Model:
    """One in the graph itself, one in each branch."""

    def product(result: str) -> str:
        attributes = f"K = {SIZE}, N = {ROWS}, bits = 4, block_size = {SIZE}, accuracy_level = 4"
        return f"{result} = com.microsoft.MatMulNBits <{attributes}> (x, packed, scales)"

    packed = ", ".join(map(str, (CODES[:, ::2] | CODES[:, 1::2] << 4).flatten()))
    scales = ", ".join(map(repr, map(float, SCALES.flatten())))
    output = f"float[3, {ROWS}]"
    return ir.from_onnx_text(f"""<ir_version: 11, opset_import: ["": 23, "com.microsoft": 1]>
    layer (float[3, {SIZE}] x, bool condition) => ({output} y, {output} z)
    <uint8[{ROWS}, 1, {SIZE // 2}] packed = {{{packed}}}, float[{ROWS}, 1] scales = {{{scales}}}> {{
        {product("y")}
        z = If (condition) <
            then_branch = positive () => ({output} z_then) {{ {product("z_then")} }},
            else_branch = negative () => ({output} z_else) {{
                {product("w")}
                z_else = Neg(w)
            }}
        >
    }}""")


def levels(model: ir.Model) -> list[int]:
    return [node.attributes["accuracy_level"].as_int() for node in model.graph.all_nodes() if node.domain]


@pytest.mark.parametrize("condition", [True, False])
def test_activations_are_as_they_are(condition: bool) -> None:
    model, feeds = products(), {"x": X, "condition": np.array(condition)}
    assert levels(model) == [4, 4, 4]
    rounded = run(model, feeds)
    assert FloatActivations()(model).modified
    assert levels(model) == [1, 1, 1]
    outputs = run(model, feeds)
    for name, expected in {"y": EXACT, "z": EXACT if condition else -EXACT}.items():
        np.testing.assert_allclose(outputs[name], expected, rtol=0, atol=1e-4)
        assert np.abs(rounded[name] - expected).max() > 1e-2


def test_leaves_a_model_without_products_alone() -> None:
    model = ir.from_onnx_text(
        "<ir_version: 11, opset_import: ['': 23]> g (float[1] x) => (float[1] y) { y = Neg(x) }".replace("'", '"')
    )
    assert not FloatActivations()(model).modified
