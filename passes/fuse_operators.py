"""Fuse, in a graph and in everything that it calls, what inference has an operator for.

Before, in every block, and in every branch of its `torch.cond`::

    some fifty operators

After::

    rms_norm, linear, linear, linear, RotaryEmbedding, RotaryEmbedding, Attention, linear, add,
    rms_norm, linear, silu, linear, mul, linear, add

It is for inference, and comes last: a cache update within attention can no longer be cut out of it. A pattern that does
not occur is left as it is; what it is made of runs all the same.
"""

import operator
from collections.abc import Sequence
from typing import Any

from torch import fx, nn

from modcompile.passes.cancel_layouts import cancel_layouts
from modcompile.passes.drop_casts import drop_casts
from modcompile.passes.eliminate_dead_code import eliminate_dead_code
from modcompile.passes.equal_halves import has_equal_halves
from modcompile.passes.extract_subgraph import get_attribute
from modcompile.passes.fuse_attention import fuse_attention
from modcompile.passes.fuse_rms_norm import fuse_rms_norm
from modcompile.passes.fuse_rotary_embedding import fuse_rotary_embedding
from modcompile.passes.graph_calls import calls_of
from modcompile.passes.lazy_graph_module import LazyGraphModule
from modcompile.passes.outlined_form import copy_graph
from modcompile.stages import stage


@stage("fusing operators")
def fuse_operators(gm: fx.GraphModule) -> fx.GraphModule:
    """Return the graph, in outlined form or lowered, with fused operators; parameters are shared with `gm`.

    Keeps equal: every output, but for rounding, for inputs of the dtypes that were traced.
    """
    fused, _ = _fuse(gm, [False] * len(gm.graph.find_nodes(op="placeholder")))
    return fused


def _fuse(gm: fx.GraphModule, halves: Sequence[bool]) -> tuple[fx.GraphModule, list[bool]]:
    """The fused module, and which of its outputs have equal halves, given which of its inputs have."""
    graph, outputs = copy_graph(gm)
    output = graph.output(outputs)
    drop_casts(graph)
    inputs = graph.find_nodes(op="placeholder")
    equal_halves = {node for node, is_equal in zip(inputs, halves, strict=True) if is_equal}
    called: dict[str, nn.Module] = {}
    results: dict[Any, list[bool]] = {}
    for node in graph.nodes:
        for target, operands in calls_of(node):
            module = gm.get_submodule(target)
            if isinstance(module, fx.GraphModule):
                called[target], results[node] = _fuse(module, [operand in equal_halves for operand in operands])
        if node.target is operator.getitem and node.args[0] in results:
            is_equal = results[node.args[0]][node.args[1]]
        else:
            is_equal = has_equal_halves(node, equal_halves)
        if is_equal:
            equal_halves.add(node)
    fuse_rms_norm(graph)
    fuse_rotary_embedding(graph, equal_halves)
    fuse_attention(graph)
    cancel_layouts(graph)
    eliminate_dead_code(graph)
    returned: Any = output.args[0]
    names = {str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr")}
    attributes = {name: called[name] if name in called else get_attribute(gm, name) for name in names}
    return LazyGraphModule(attributes, graph), [value in equal_halves for value in returned]
