"""Decide gates once and for all, so that they cost nothing: their layers always run, or never.

Before, in the graph of `harden_gates`::

    hidden, key_0, value_0, routing_mask_0 = blocks.0(hidden, …, router_input_0, …)
    hidden, key_1, value_1, key_2, value_2, routing_mask_1 = blocks.1-2(hidden, …, router_input_1, …)
    hidden, key_3, value_3, routing_mask_2 = blocks.3(hidden, …, router_input_2, …)

After, where the first gate is always closed, and the second always open::

    hidden, key_0, value_0 = blocks.0(hidden, …)                                  # skip_block
    hidden, key_1, value_1 = blocks.1(hidden, …)                                  # as without a gate
    hidden, key_2, value_2 = blocks.2(hidden, …)
    hidden, key_3, value_3, routing_mask_2 = blocks.3(hidden, …, router_input_2, …)

`routing_threshold` and the routing masks are those of the gates that are left; without any, the graph is in outlined
form, as a dense model's.
"""

from collections.abc import Callable, Collection
from typing import Any

from torch import fx, nn

from modcompile.passes.eliminate_dead_code import eliminate_dead_code
from modcompile.passes.harden_gates import RoutingInputs
from modcompile.passes.lazy_graph_module import LazyGraphModule
from modcompile.passes.outlined_form import (
    called_modules,
    copy_graph,
    getitems,
    inner_block,
    is_group,
    layers_called,
    results,
    routed_calls,
)
from modcompile.passes.skip_block import skip_block
from modcompile.passes.skip_path import skip_of

_NUM_GATE_INPUTS = 3  # router_input, least_score and token_mask, behind what the block takes


def fold_gates(gm: fx.GraphModule, executed: Collection[range], skipped: Collection[range]) -> fx.GraphModule:
    """Return the graph of `harden_gates` without the gates of these layers; parameters are shared with `gm`.

    `executed` and `skipped` hold layers as `gated_layers` has them. A skipped layer keeps what makes keys and values.

    Keeps equal: every output but the masks of these gates, at a threshold of 0 for `executed`, and of 1 for `skipped`.

    Raises:
        UnsupportedModelError: a block to be skipped writes to a tensor in place.
    """
    graph, outputs = copy_graph(gm)
    modules: dict[str, Any] = dict(called_modules(gm))
    calls = routed_calls(gm, graph)
    folded = {*executed, *skipped}
    masks = {results(call)[-1] for call in calls if layers_called(call) in folded}
    graph.output(tuple(node for node in outputs if node not in masks))
    kept: list[int] = []
    for position, call in enumerate(calls):
        layers = layers_called(call)
        if layers in folded:
            block = modules.pop(str(call.target)).get_submodule("block")
            modules |= _inline(call, block, inner_block if layers in executed else _skipped)
        else:
            _, least_score, _ = call.args[-_NUM_GATE_INPUTS:]
            assert isinstance(least_score, fx.Node)
            least_score.args = (least_score.args[0], 1 + len(kept))
            kept.append(position)
    eliminate_dead_code(graph)
    modules.pop("routing_inputs")
    if kept:
        biases = list(gm.get_submodule("routing_inputs").parameters())
        modules["routing_inputs"] = RoutingInputs(biases[position] for position in kept)
        modules["routing_threshold"] = gm.get_buffer("routing_threshold")[kept]
    graph.lint()
    return LazyGraphModule(modules, graph)


def _skipped(masked: fx.GraphModule) -> fx.GraphModule:
    return skip_block(inner_block(masked), skip_of(masked))


def _inline(
    call: fx.Node, block: fx.GraphModule, rewrite: Callable[[fx.GraphModule], fx.GraphModule]
) -> dict[str, nn.Module]:
    """Replace the call by one of each rewritten masked block, in place, and return these, by name."""
    graph, first = call.graph, layers_called(call).start
    inputs = call.args[:-_NUM_GATE_INPUTS]
    old = results(call)[:-1]
    blocks: dict[str, nn.Module] = {}

    def insert(member: fx.GraphModule, args: tuple[Any, ...], count: int) -> list[fx.Node]:
        name = f"blocks.{first + len(blocks)}"
        blocks[name] = rewrite(member)
        values = getitems(graph.call_module(name, args), count)
        values[0].meta = dict(old[0].meta)
        return values

    with graph.inserting_before(call):
        new = _insert_members(block, inputs, insert) if is_group(block) else insert(block, inputs, len(old))
    for value, replacement in zip(old, new, strict=True):
        replacement.meta = dict(value.meta)
        value.replace_all_uses_with(replacement)
    return blocks


def _insert_members(
    group: fx.GraphModule, inputs: tuple[Any, ...], insert: Callable[..., list[fx.Node]]
) -> list[fx.Node]:
    *placeholders, _ = group.graph.find_nodes(op="placeholder")
    env: dict[Any, Any] = dict(zip(placeholders, inputs, strict=True))
    for node in group.graph.find_nodes(op="call_module"):
        values = results(node)
        args = tuple(env[arg] for arg in node.args[:-1])
        env.update(zip(values, insert(group.get_submodule(str(node.target)), args, len(values)), strict=True))
    (output,) = group.graph.find_nodes(op="output")
    return [env[value] for value in output.args[0]]
