from dataclasses import dataclass

import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from modcompile.passes.group_query_attention import group_query_attention, rotate

_SCALE = 0.3
_POSITIONS = 32


@dataclass(frozen=True)
class Operator:
    """One node of ONNX Runtime, and the reference with the same settings."""

    heads: int = 4
    kv_heads: int = 2
    size: int = 16
    rotary: bool = True
    rotated: int = 16
    window: int = -1
    packed: bool = False

    def inputs(self, tokens: int, pasts: list[int]) -> dict[str, torch.Tensor | None]:
        """Of rows with so many tokens in their caches, in the order of the operator; past slots behind them too."""
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator)

        batch, longest = len(pasts), max(pasts)
        query = random(batch, tokens, self.heads * self.size)
        key, value = (random(batch, tokens, self.kv_heads * self.size) for _ in range(2))
        past_key, past_value = (random(batch, self.kv_heads, longest, self.size) for _ in range(2))
        angles = random(_POSITIONS, self.rotated // 2)
        return {
            "query": torch.cat([query, key, value], -1) if self.packed else query,
            "key": None if self.packed else key,
            "value": None if self.packed else value,
            "past_key": past_key,
            "past_value": past_value,
            "seqlens_k": torch.tensor([past + tokens - 1 for past in pasts], dtype=torch.int32),
            "total": torch.tensor(longest + tokens, dtype=torch.int32),
            "cos": angles.cos() if self.rotary else None,
            "sin": angles.sin() if self.rotary else None,
        }

    def in_onnxruntime(self, inputs: dict[str, torch.Tensor | None]) -> list[torch.Tensor]:
        names = {name: None if tensor is None else ir.Value(name=name) for name, tensor in inputs.items()}
        for name, value in names.items():
            tensor = inputs[name]
            if value is not None and tensor is not None:
                value.type = ir.TensorType(ir.tensor_adapters.from_torch_dtype(tensor.dtype))
                value.shape = ir.Shape(tensor.shape)
        given = list(names.values())
        attributes = [
            ir.AttrInt64("num_heads", self.heads),
            ir.AttrInt64("kv_num_heads", self.kv_heads),
            ir.AttrInt64("do_rotary", int(self.rotary)),
            ir.AttrInt64("local_window_size", self.window),
            ir.AttrFloat32("scale", _SCALE),
        ]
        outputs = [ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT)) for name in ("y", "keys", "values")]
        node = ir.Node("com.microsoft", "GroupQueryAttention", given, attributes, outputs=outputs)
        imports = {"": 23, "com.microsoft": 1}
        values = [value for value in given if value is not None]
        graph = ir.Graph(values, outputs, nodes=[node], opset_imports=imports, name="attention")
        model = ir.to_proto(ir.Model(graph, ir_version=11)).SerializeToString()
        session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
        feeds = {name: tensor.numpy() for name, tensor in inputs.items() if tensor is not None}
        return [torch.from_numpy(array) for array in session.run(None, feeds)]

    def in_pytorch(self, inputs: dict[str, torch.Tensor | None]) -> tuple[torch.Tensor, ...]:
        outputs: tuple[torch.Tensor, ...] = group_query_attention(
            *inputs.values(), self.heads, self.kv_heads, _SCALE, self.window
        )
        return outputs


@pytest.mark.parametrize(
    "operator",
    [
        pytest.param(Operator(), id="rotary"),
        pytest.param(Operator(packed=True), id="rotary, packed"),
        pytest.param(Operator(rotary=False), id="no rotary"),
        pytest.param(Operator(rotary=False, packed=True), id="no rotary, packed"),
        pytest.param(Operator(rotary=False, size=8), id="no rotary, small heads"),
        pytest.param(Operator(window=3), id="a window"),
        pytest.param(Operator(window=1, packed=True), id="a window of itself, packed"),
        pytest.param(Operator(heads=2, window=1), id="as many keys as queries"),
        pytest.param(Operator(size=32), id="half of a head rotated"),
    ],
)
@pytest.mark.parametrize(
    ("tokens", "pasts"),
    [
        pytest.param(1, [0], id="first token"),
        pytest.param(5, [0], id="prefill"),
        pytest.param(5, [0, 0], id="prefill of a batch"),
        pytest.param(1, [4], id="step"),
        pytest.param(1, [4, 2, 7], id="step of rows of different lengths"),
        pytest.param(3, [4], id="several tokens after others"),
    ],
)
def test_computes_what_onnxruntime_computes(operator: Operator, tokens: int, pasts: list[int]) -> None:
    inputs = operator.inputs(tokens, pasts)
    actual, expected = operator.in_pytorch(inputs), operator.in_onnxruntime(inputs)
    torch.testing.assert_close(actual[0], expected[0], rtol=0, atol=1e-5)
    for present, other in zip(actual[1:], expected[1:], strict=True):
        assert present.shape == (len(pasts), operator.kv_heads, max(pasts) + tokens, operator.size)
        for row, past in enumerate(pasts):  # what lies behind a row's tokens is undefined
            length = past + tokens
            torch.testing.assert_close(present[row, :, :length], other[row, :, :length], rtol=0, atol=1e-5)


def test_a_slot_behind_the_tokens_of_a_row_changes_nothing() -> None:
    inputs = Operator().inputs(1, [4, 2])
    expected = Operator().in_pytorch(inputs)
    for name in ("past_key", "past_value"):
        past = inputs[name]
        assert past is not None
        past[1, :, 2:] = 1e3
    torch.testing.assert_close(Operator().in_pytorch(inputs), expected, rtol=0, atol=0)


def test_has_the_shapes_that_tracing_is_told() -> None:
    operator = Operator()
    inputs = operator.inputs(3, [4, 4])
    whole = (*inputs.values(), operator.heads, operator.kv_heads, _SCALE, operator.window)
    torch.library.opcheck(group_query_attention, whole, test_utils=("test_schema", "test_faketensor"))


def test_rotates_by_halves_and_keeps_the_rest() -> None:
    x, angles = torch.arange(12.0).view(1, 1, 2, 6), torch.tensor([[[0.0, 0.0], [torch.pi / 2, torch.pi]]])
    expected = torch.tensor([[0.0, 1, 2, 3, 4, 5], [-8, -7, 6, -9, 10, 11]]).view(1, 1, 2, 6)
    torch.testing.assert_close(rotate(x, angles.cos(), angles.sin()), expected, rtol=0, atol=1e-5)
