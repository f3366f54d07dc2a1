"""Give decoder blocks a gate per token that mixes the block with its skip path.

Before::

    hidden, key, value = blocks.i(hidden, *shared, past_key, past_value)

After::

    hidden, key, value, gate = blocks.i(hidden, *shared, past_key, past_value, router_input)

where blocks.i is now, with the gate `[B, T, 1]`::

    router_logits = router(router_input)
    gate = gate(router_logits)
    hidden, key, value = block(hidden, *shared, past_key, past_value, gate)

and block is `mixed_block`, with the adapter of its layer as the skip path, if it has one; the gates of the routed
blocks are the last outputs of the graph, in the order of the layers. `router_input` is the same hidden state; or,
where N gates are decided at once, the one in front of the first of them, so that an export can decide them with one
product (`join_decisions`). Routers stay one for each gate: what is trained, stored, folded and given thresholds is the
same whatever N is.

Keys and values are those of the block, whatever the gate: a later token attends to the same ones whether or not
an earlier one skipped. For the same reason the gate of a group (`group_blocks`) mixes each of its blocks: a skipped
token has the keys of an unchanged hidden state in all of them, whether or not another token of the call is executed.
"""

import operator
from collections.abc import Mapping, Sequence

from torch import fx, nn

from modcompile.passes.lazy_graph_module import LazyGraphModule
from modcompile.passes.map_blocks import map_blocks
from modcompile.passes.mixed_block import mixed_block
from modcompile.passes.outlined_form import block_calls, called_modules, copy_graph, getitems, layers_called, results


def insert_depth_gates(
    gm: fx.GraphModule,
    routers: Mapping[int, nn.Module],
    gate: nn.Module,
    *,
    gates_per_decision: int = 1,
    adapters: Mapping[int, nn.Module] | None = None,
) -> fx.GraphModule:
    """Return the outlined form with gated blocks at the layers that are keys of `routers`, groups at their first.

    `routers[i]` maps the hidden state `[B, T, H]` to `router_logits [B, T, 1]`; `gate` maps these to [0, 1]. Of each
    `gates_per_decision` consecutive gates, or what is left, all routers read what the first reads. `adapters[i]` is the
    skip path of layer i, in a group or alone (`skip_path`). Blocks, routers and adapters are shared, not copied.

    Keeps equal: with every gate at 1, every output, bit for bit.
    """
    graph, outputs = copy_graph(gm)
    modules = called_modules(gm)
    gates: list[fx.Node] = []
    for call in block_calls(graph):
        layers = layers_called(call)
        layer = layers.start
        if layer not in routers:
            continue
        if len(gates) % gates_per_decision == 0:
            router_input = call.args[0]
        call.args += (router_input,)
        name, values = str(call.target), results(call)
        skips = [(adapters or {}).get(each) for each in layers]
        modules[name] = _gated_block(modules[name], routers[layer], gate, skips, len(values))
        with graph.inserting_after(values[-1]):
            gates.append(graph.call_function(operator.getitem, (call, len(values))))
    graph.output((*outputs, *gates))
    graph.lint()
    return LazyGraphModule(modules, graph)


def _gated_block(
    block: nn.Module, router: nn.Module, gate: nn.Module, skips: Sequence[nn.Module | None], num_outputs: int
) -> fx.GraphModule:
    assert isinstance(block, fx.GraphModule)
    graph = fx.Graph()
    inputs = [graph.placeholder(node.name) for node in block.graph.find_nodes(op="placeholder")]
    router_input = graph.placeholder("router_input")
    value = graph.call_module("gate", (graph.call_module("router", (router_input,)),))
    outputs = getitems(graph.call_module("block", (*inputs, value)), num_outputs)
    graph.output((*outputs, value))
    of_members = iter(skips)
    mixed = map_blocks(block, lambda member: mixed_block(member, next(of_members)), "gate")
    return LazyGraphModule({"router": router, "gate": gate, "block": mixed}, graph)
