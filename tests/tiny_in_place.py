"""A hand-made decoder of one block whose cache is updated in place, by ONNX Runtime's own attention operator."""

import numpy as np
import onnx_ir as ir

_NUM_INPUTS = 5
_GRAPH = """
<ir_version: 11, opset_import: ["": 23, "com.microsoft": 1]>
in_place (
  int64[batch, sequence] input_ids, int64[batch, total_sequence] attention_mask, int64[batch, sequence] position_ids,
  float[batch, 2, past, 8] "past_key_values.0.key", float[batch, 2, past, 8] "past_key_values.0.value",
  float[300, 32] embeddings, float[128, 32] positions, float[32, 32] q, float[32, 16] kv, float[32, 32] out,
  float[32, 300] head
) => (
  float[batch, sequence, 300] logits,
  float[batch, 2, total, 8] "present.0.key", float[batch, 2, total, 8] "present.0.value"
) {
  token = Gather (embeddings, input_ids)
  position = Gather (positions, position_ids)
  x = Add (token, position)
  queries = MatMul (x, q)
  keys = MatMul (x, kv)
  sizes = Shape (attention_mask)
  batch_size = Shape <start: int = 0, end: int = 1> (attention_mask)
  one = Constant <value_int: int = 1> ()
  total_length = Gather (sizes, one)
  last = Sub (total_length, one)
  lasts = Expand (last, batch_size)
  lengths = Cast <to: int = 6> (lasts)
  longest = Cast <to: int = 6> (total_length)
  attended, "present.0.key", "present.0.value" = com.microsoft.GroupQueryAttention <num_heads: int = 4,
    kv_num_heads: int = 2> (queries, keys, keys, "past_key_values.0.key", "past_key_values.0.value", lengths, longest)
  mixed = MatMul (attended, out)
  y = Add (x, mixed)
  logits = MatMul (y, head)
}
"""


def in_place_model() -> ir.Model:
    """Of 300 tokens and 128 absolute positions, with random weights; its metadata says what its cache allows.

    How many slots of the cache are filled is told by the shape of `attention_mask`, not by what it holds.
    """
    model = ir.from_onnx_text(_GRAPH)
    numbers = np.random.default_rng(0)
    for weight in model.graph.inputs[_NUM_INPUTS:]:
        assert weight.shape is not None
        weight.const_value = ir.tensor(numbers.normal(size=weight.shape.numpy()).astype(np.float32), name=weight.name)
        model.graph.register_initializer(weight)
    del model.graph.inputs[_NUM_INPUTS:]
    model.metadata_props["modcompile.cache"] = "in_place"
    return model
