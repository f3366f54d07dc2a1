"""A tiny model of two layers in the form that decodes in place: ONNX Runtime's GroupQueryAttention, no positions."""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

VOCAB_SIZE, HIDDEN_SIZE, NUM_LAYERS, NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE = 50, 32, 2, 4, 2, 16
MAX_POSITIONS = 64
_ALL = np.iinfo(np.int64).max


def write_in_place_model(model_file: Path, *, keeps_logits: bool = True) -> Path:
    """Write it as `model_file`, without the input `logits_to_keep` if `keeps_logits` is false.

    It tells a routing mask: which tokens are above `routing_threshold`, as a share of the vocabulary.
    """
    random = np.random.default_rng(0)
    angles = np.outer(np.arange(MAX_POSITIONS), 0.5 ** np.arange(HEAD_SIZE // 2))
    constants = {
        "embedding": random.normal(size=(VOCAB_SIZE, HIDDEN_SIZE)),
        "head": random.normal(size=(HIDDEN_SIZE, VOCAB_SIZE)) * 0.1,
        "cos": np.cos(angles),
        "sin": np.sin(angles),
        "scale": np.array(1 / VOCAB_SIZE),
        "masked": np.array(-1e9),
        "unmasked": np.array(0.0),
        "routing_threshold": np.array([0.5]),
    }
    sizes = {
        "one": np.array(1),
        "zero": np.array(0),
        "last": np.array([_ALL]),
        "axis": np.array([1]),
        "middle": np.array([1, 2]),
        "logits_to_keep": np.array([_ALL]),
    }
    node = helper.make_node
    nodes = [
        node("Gather", ["embedding", "input_ids"], ["hidden.0"]),
        node("Shape", ["input_ids"], ["batch"], start=0, end=1),
        node("Shape", ["input_ids"], ["added"], start=1, end=2),
        node("Shape", ["attention_mask"], ["total"], start=1, end=2),
        node("Squeeze", ["total"], ["total.scalar"]),
        node("Cast", ["total.scalar"], ["total.int"], to=TensorProto.INT32),
        node("Sub", ["total", "one"], ["before_last"]),
        node("Expand", ["before_last", "batch"], ["before_last.rows"]),
        node("Cast", ["before_last.rows"], ["seqlens_k"], to=TensorProto.INT32),
        # Positions count tokens only; in padding they are of no matter.
        node("CumSum", ["attention_mask", "one"], ["counted"]),
        node("Sub", ["counted", "one"], ["from_zero"]),
        node("Max", ["from_zero", "zero"], ["positions.all"]),
        node("Neg", ["added"], ["minus_added"]),
        node("Slice", ["positions.all", "minus_added", "last", "axis"], ["positions"]),
        node("Cast", ["attention_mask"], ["seen"], to=TensorProto.BOOL),
        node("Where", ["seen", "unmasked", "masked"], ["bias.keys"]),
        node("Unsqueeze", ["bias.keys", "middle"], ["bias.one"]),
        node("Concat", ["batch", "axis", "added", "total"], ["bias.shape"], axis=0),
        node("Expand", ["bias.one", "bias.shape"], ["bias"]),
    ]
    for layer in range(NUM_LAYERS):
        widths = {"q": NUM_HEADS * HEAD_SIZE, "k": NUM_KV_HEADS * HEAD_SIZE, "v": NUM_KV_HEADS * HEAD_SIZE}
        for name, width in widths.items():
            constants[f"{name}.{layer}.weight"] = random.normal(size=(HIDDEN_SIZE, width)) * 0.3
            nodes.append(node("MatMul", [f"hidden.{layer}", f"{name}.{layer}.weight"], [f"{name}.{layer}"]))
        constants[f"o.{layer}.weight"] = random.normal(size=(widths["q"], HIDDEN_SIZE)) * 0.3
        # By an operator of its own: of the positions of a prompt, the attention's own rotation looks at the first only.
        for name, heads in (("q", NUM_HEADS), ("k", NUM_KV_HEADS)):
            inputs = [f"{name}.{layer}", "positions", "cos", "sin"]
            rotated = [f"{name}.{layer}.rotated"]
            nodes.append(node("RotaryEmbedding", inputs, rotated, domain="com.microsoft", num_heads=heads))
        projected = [f"q.{layer}.rotated", f"k.{layer}.rotated", f"v.{layer}"]
        past = [f"past_key_values.{layer}.{kind}" for kind in ("key", "value")]
        sequence = ["seqlens_k", "total.int", "", "", "", "bias"]
        nodes += [
            node(
                "GroupQueryAttention",
                [*projected, *past, *sequence],
                [f"attended.{layer}", f"present.{layer}.key", f"present.{layer}.value"],
                domain="com.microsoft",
                num_heads=NUM_HEADS,
                kv_num_heads=NUM_KV_HEADS,
            ),
            node("MatMul", [f"attended.{layer}", f"o.{layer}.weight"], [f"o.{layer}"]),
            node("Add", [f"hidden.{layer}", f"o.{layer}"], [f"hidden.{layer + 1}"]),
        ]
    nodes += [
        node("Neg", ["logits_to_keep"], ["first_kept"]),
        node("Slice", [f"hidden.{NUM_LAYERS}", "first_kept", "last", "axis"], ["kept"]),
        node("MatMul", ["kept", "head"], ["logits"]),
        node("Cast", ["input_ids"], ["ids.float"], to=TensorProto.FLOAT),
        node("Mul", ["ids.float", "scale"], ["share"]),
        node("Greater", ["share", "routing_threshold"], ["routing.0"]),
    ]
    value = helper.make_tensor_value_info
    shape: list[str | int | None] = ["B", NUM_KV_HEADS, "P", HEAD_SIZE]
    cached = [f"{layer}.{kind}" for layer in range(NUM_LAYERS) for kind in ("key", "value")]
    graph_inputs = [
        value("input_ids", TensorProto.INT64, ["B", "T"]),
        value("attention_mask", TensorProto.INT64, ["B", "S"]),
        *(value(f"past_key_values.{name}", TensorProto.FLOAT, shape) for name in cached),
        *([value("logits_to_keep", TensorProto.INT64, [1])] if keeps_logits else []),
        value("routing_threshold", TensorProto.FLOAT, [1]),
    ]
    outputs = [
        value("logits", TensorProto.FLOAT, ["B", "K", VOCAB_SIZE]),
        *(value(f"present.{name}", TensorProto.FLOAT, ["B", NUM_KV_HEADS, "S", HEAD_SIZE]) for name in cached),
        value("routing.0", TensorProto.BOOL, ["B", "T"]),
    ]
    initializers = [numpy_helper.from_array(array.astype(np.float32), name) for name, array in constants.items()]
    initializers += [numpy_helper.from_array(array.astype(np.int64), name) for name, array in sizes.items()]
    graph = helper.make_graph(nodes, "tiny", graph_inputs, outputs, initializers)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    helper.set_model_props(model, {"modcompile.cache": "in_place"})
    onnx.save(model, model_file)
    return model_file
