"""Stamp out traced blocks for all layers of a model.

Before (what a trace of the first two layers gives)::

    hidden, … = blocks.0(hidden, …, past_key_0, past_value_0)
    hidden, … = blocks.1(hidden, …, past_key_1, past_value_1)

After::

    hidden, … = blocks.0(hidden, …, past_key_0, past_value_0)
    …
    hidden, … = blocks.29(hidden, …, past_key_29, past_value_29)

so that the time of a trace does not grow with the depth of the model. Whether the layers are alike is for the caller to
say (`modcompile.tracing.layers_are_alike`); this pass compares what it can see, the traced blocks and the shapes of
the parameters.
"""

import operator
from collections.abc import Sequence

import torch
from torch import fx

from modcompile.errors import UnsupportedModelError
from modcompile.passes.code_key import code_key
from modcompile.passes.extract_subgraph import get_attribute
from modcompile.passes.lazy_graph_module import LazyGraphModule
from modcompile.passes.outlined_form import NUM_TOKEN_INPUTS, block_calls, results


def repeat_blocks(gm: fx.GraphModule, layers: Sequence[torch.nn.Module]) -> fx.GraphModule:
    """Return the outlined form of `gm` with one block for each of `layers`, whose parameters it takes.

    Keeps equal: the traced blocks, bit for bit; the others run the same code with their own parameters.

    Raises:
        UnsupportedModelError: two traced blocks differ, or a layer lacks a parameter that the traced block has.
    """
    calls = block_calls(gm.graph)
    template = gm.get_submodule(str(calls[-1].target))
    assert isinstance(template, fx.GraphModule)
    for call in calls[:-1]:
        block = gm.get_submodule(str(call.target))
        if code_key(block) != code_key(template):
            raise UnsupportedModelError(
                f"{call.target} and {calls[-1].target} differ; neither can be stamped out for both"
            )

    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    (prologue,) = gm.graph.find_nodes(op="call_module", target="prologue")
    (epilogue,) = gm.graph.find_nodes(op="call_module", target="epilogue")
    tensors_per_layer = (len(placeholders) - NUM_TOKEN_INPUTS) // len(calls)

    graph = fx.Graph()
    modules = {name: gm.get_submodule(name) for name in ("prologue", "epilogue")}
    env = {node: graph.node_copy(node) for node in placeholders[:NUM_TOKEN_INPUTS]}
    pasts: list[list[fx.Node]] = []
    for index in range(len(layers)):
        traced = placeholders[NUM_TOKEN_INPUTS:][:tensors_per_layer]
        pasts.append([graph.placeholder(f"past_key_values_{index}_{part}") for part in range(tensors_per_layer)])
        for copy, node in zip(pasts[-1], traced, strict=True):
            copy.meta = dict(node.meta)
    env.update(zip(placeholders[NUM_TOKEN_INPUTS:], (node for past in pasts for node in past), strict=False))

    for node in (prologue, *results(prologue)):
        env[node] = graph.node_copy(node, env.__getitem__)
    hidden, *rest = calls[0].args
    assert isinstance(hidden, fx.Node)
    current, presents = env[hidden], []
    for index, layer in enumerate(layers):
        name = f"blocks.{index}"
        modules[name] = _with_parameters_of(template, layer, name)
        shared = [env[arg] for arg in rest[: len(rest) - tensors_per_layer] if isinstance(arg, fx.Node)]
        call = graph.call_module(name, (current, *shared, *pasts[index]))
        outputs = []
        for position, node in enumerate(results(calls[0])):
            outputs.append(graph.call_function(operator.getitem, (call, position)))
            outputs[-1].meta = dict(node.meta)
        current, *present = outputs
        presents.extend(present)
    env[results(calls[-1])[0]] = current
    for node in (epilogue, *results(epilogue)):
        env[node] = graph.node_copy(node, env.__getitem__)
    graph.output((env[results(epilogue)[0]], *presents))
    graph.lint()
    return LazyGraphModule(modules, graph)


def _with_parameters_of(template: fx.GraphModule, layer: torch.nn.Module, name: str) -> fx.GraphModule:
    own = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    attributes = {}
    for node in template.graph.find_nodes(op="get_attr"):
        target = str(node.target)
        traced = get_attribute(template, target)
        # A constant of the trace, not of the layer, is the same everywhere.
        tensor = own.get(target, traced if not isinstance(traced, torch.nn.Parameter) else None)
        if tensor is None or tensor.shape != traced.shape:
            raise UnsupportedModelError(f"{name} has no parameter {target} of shape {tuple(traced.shape)}")
        attributes[target] = tensor
    return LazyGraphModule(attributes, template.graph)
