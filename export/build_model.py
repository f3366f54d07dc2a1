"""From a lowered graph to an ONNX model with the names that runtimes know.

Inputs `input_ids [B, T]`, `attention_mask [B, P + T]`, `position_ids [B, T]`, `past_key_values.{i}.key|value
[B, heads, P, D]`; outputs `logits [B, T, V]`, `present.{i}.key|value [B, heads, P + T, D]` and, if asked for, for each
routed layer i `routing.{i}` (bool `[B, T]`) or `precision.{i}` (int64 `[B, T]`, bits); where the layers 2 to 4 share a
gate, `routing.2-4`. `routing_threshold` (float32, one a gate) or `precision_bias` (float32 `[routed layers,
precisions]`) is an initializer that is also an input: a session may override it, and need not know of it.
"""

from collections.abc import Sequence

import onnx_ir as ir
import onnx_ir.passes.common as common_passes
import torch
from torch import fx

from modcompile.export.compose_graph import Composer, Operand, opset_imports
from modcompile.export.hoist_shared import HoistShared
from modcompile.export.inner_weights import InnerWeights
from modcompile.export.pretranspose_weights import PretransposeWeights
from modcompile.export.quiet_exporter import quiet_exporter
from modcompile.export.store_half import StoreHalf
from modcompile.layer_ranges import name_of
from modcompile.passes import fuse_operators
from modcompile.passes.add_unmasked_branch import add_unmasked_branch
from modcompile.passes.compact_tokens import compact_tokens
from modcompile.passes.fuse_for_onnxruntime import fuse_for_onnxruntime
from modcompile.passes.join_decisions import join_decisions
from modcompile.passes.keep_last_logits import LOGITS_TO_KEEP, keep_last_logits
from modcompile.passes.outlined_form import NUM_TOKEN_INPUTS, gated_layers
from modcompile.stages import stage

IR_VERSION = 11
ROUTING_THRESHOLD, PRECISION_BIAS = "routing_threshold", "precision_bias"
CACHE, IN_PLACE, UNFUSED = "modcompile.cache", "in_place", "modcompile.unfused"
_OVERRIDABLE = (ROUTING_THRESHOLD, PRECISION_BIAS, LOGITS_TO_KEEP)

_SIZES = ({"batch": 2, "sequence": 3, "past": 5}, {"batch": 3, "sequence": 5, "past": 7})


def build_model(
    gm: fx.GraphModule,
    *,
    emit_routing: bool = False,
    max_positions: int | None = None,
    compact: bool = False,
    unmasked_branch: bool = False,
    half: bool = False,
) -> ir.Model:
    """The ONNX model of a graph in the form that `lower_gates` returns (or in outlined form, for a dense model).

    With `max_positions`, how long a sequence may get, it has the operators that ONNX Runtime alone has; without, those
    of the ONNX standard. `compact` is for blocks that compute the open tokens only (`compact_tokens`), and
    `unmasked_branch` for those that have a branch without masks. With `half`, weights that float16 holds exactly are
    stored so. Weights are not copied: the tensors of the result are those of
    `gm` until it is saved.
    """
    if unmasked_branch:
        gm = add_unmasked_branch(gm)
    gm = fuse_operators(join_decisions(gm))
    if compact:
        gm = compact_tokens(gm)
    metadata = {}
    if max_positions is not None:
        fused = fuse_for_onnxruntime(gm, max_positions)
        gm = fused.gm
        metadata = {CACHE: IN_PLACE} if fused.updates_in_place else {}
        metadata |= {UNFUSED: "; ".join(fused.unfused)} if fused.unfused else {}
        gm = keep_last_logits(gm)
    composer = Composer()
    inputs = _inputs(gm)
    nodes, (logits, *rest) = composer.compose(gm, inputs)
    names = [name_of(layers) for layers in gated_layers(gm)]
    cache, routing = rest[: len(rest) - len(names)], rest[len(rest) - len(names) :]
    outputs = [_named(logits, "logits", ("batch", "sequence" if max_positions is None else "kept", None))]
    for index, operand in enumerate(cache):
        name = f"present.{index // 2}.{('key', 'value')[index % 2]}"
        outputs.append(_named(operand, name, ("batch", None, "total_sequence", None)))
    overridable = [composer.initializers[name] for name in _OVERRIDABLE if name in composer.initializers]
    if emit_routing and PRECISION_BIAS in composer.initializers:
        for layers, operand in zip(names, routing, strict=True):
            outputs.append(_named(operand, f"precision.{layers}", ("batch", "sequence")))
    elif emit_routing:
        axis = composer.constant("routing.axis", torch.tensor([2]))
        for layers, operand in zip(names, routing, strict=True):
            nodes.append(ir.Node("", "Squeeze", [operand.value, axis], name=f"routing.{layers}"))
            first, second = (tensor.squeeze(2) for tensor in operand.example)
            squeezed = Operand(nodes[-1].outputs[0], (first, second))
            outputs.append(_named(squeezed, f"routing.{layers}", ("batch", "sequence")))

    graph_inputs = [*(operand.value for operand in inputs), *overridable]
    graph = ir.Graph(
        graph_inputs,
        outputs,
        nodes=nodes,
        initializers=list(composer.initializers.values()),
        opset_imports=opset_imports(),
        name="modcompile",
    )
    functions = list(composer.functions.values())
    model = ir.Model(graph, ir_version=IR_VERSION, producer_name="modcompile", functions=functions)
    model.metadata_props.update(metadata)
    with stage("running ONNX passes"), quiet_exporter():
        ir.passes.Sequential(
            common_passes.InlinePass(),
            PretransposeWeights(),
            *([StoreHalf()] if half else []),
            common_passes.DeduplicateInitializersPass(),
            HoistShared(),
            InnerWeights(),
            common_passes.OutputFixPass(),
            common_passes.RemoveUnusedNodesPass(),
            common_passes.RemoveUnusedOpsetsPass(),
            common_passes.ClearMetadataAndDocStringPass(),
        )(model)
    for value in list(graph.inputs):
        if value.name == "position_ids" and not value.uses():
            graph.inputs.remove(value)  # rotary tables are read by the slot of a token
    return model


def _inputs(gm: fx.GraphModule) -> list[Operand]:
    placeholders = gm.graph.find_nodes(op="placeholder")
    batch, tokens = "batch", ("batch", "sequence")
    operands = []
    for name, shape in zip(
        ("input_ids", "attention_mask", "position_ids"), (tokens, (batch, "total_sequence"), tokens), strict=True
    ):
        operands.append(_operand(name, shape, torch.int64))
    for index, node in enumerate(placeholders[NUM_TOKEN_INPUTS:]):
        value = node.meta["val"]
        name = f"past_key_values.{index // 2}.{('key', 'value')[index % 2]}"
        operands.append(_operand(name, (batch, int(value.shape[1]), "past_sequence", int(value.shape[3])), value.dtype))
    return operands


def _operand(name: str, shape: Sequence[str | int], dtype: torch.dtype) -> Operand:
    sizes = []
    for size in _SIZES:
        dims = {
            "batch": size["batch"],
            "sequence": size["sequence"],
            "past_sequence": size["past"],
            "total_sequence": size["past"] + size["sequence"],
        }
        sizes.append([dims[dim] if isinstance(dim, str) else dim for dim in shape])
    example = tuple(torch.ones(size, dtype=dtype) for size in sizes)
    data_type = ir.tensor_adapters.from_torch_dtype(dtype)
    return Operand(ir.Value(name=name, type=ir.TensorType(data_type), shape=ir.Shape(shape)), (example[0], example[1]))


def _named(operand: Operand, name: str, dims: Sequence[str | None]) -> ir.Value:
    value, tensor = operand.value, operand.example[0]
    value.name = name
    value.type = ir.TensorType(ir.tensor_adapters.from_torch_dtype(tensor.dtype))
    value.shape = ir.Shape([dim or size for dim, size in zip(dims, tensor.shape, strict=True)])
    return value
