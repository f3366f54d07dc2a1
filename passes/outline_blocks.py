"""Fold the nodes of every decoder block into one call.

Before (L × about 60 nodes)::

    embedding → mask, rotary → norm → linear → … → add → norm → … → linear

After::

    hidden, cos, sin, mask = prologue(input_ids, attention_mask, position_ids, past_key_0)
    hidden, key_0, value_0 = blocks.0(hidden, cos, sin, mask, past_key_0, past_value_0)
    hidden, key_1, value_1 = blocks.1(hidden, cos, sin, mask, past_key_1, past_value_1)
    …
    logits = epilogue(hidden)

the *outlined form* (`modcompile.passes.outlined_form`). What the blocks are is read from the trace
(`node.meta["nn_module_stack"]`), never from a list of architectures: the outermost module list that the trace enters,
with one hidden state going from each of its members to the next.
"""

import operator
import re
from dataclasses import dataclass

import torch
from torch import fx

from modcompile.errors import UnsupportedModelError
from modcompile.passes.extract_subgraph import extract_subgraph, find_inputs, is_symbolic_int
from modcompile.passes.lazy_graph_module import LazyGraphModule
from modcompile.passes.outlined_form import NUM_TOKEN_INPUTS

_MEMBER = re.compile(r"(.+)\.(\d+)")


@dataclass(frozen=True)
class _Region:
    """The nodes of one block, with its inputs and outputs in the order of the outlined form."""

    prefix: str
    nodes: list[fx.Node]
    inputs: list[fx.Node]
    outputs: list[fx.Node]


def outline_blocks(gm: fx.GraphModule) -> fx.GraphModule:
    """Return the outlined form of a flat trace, as `drop_guards` leaves it; parameters are shared with `gm`.

    Keeps equal: every output, bit for bit.

    Raises:
        UnsupportedModelError: there is no repeated block, or the blocks are not a chain of one hidden state.
    """
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    (output,) = [node for node in gm.graph.nodes if node.op == "output"]
    logits, presents = output.args[0][0], list(output.args[0][1:])
    regions = _order_regions(find_block_nodes(gm), placeholders[NUM_TOKEN_INPUTS:], presents)
    inside = {node for region in regions for node in region.nodes}
    before, after = _split_rest(gm, inside)

    wanted = [*(node for region in regions for node in region.inputs), *find_inputs(after)]
    prologue_outputs = [node for node in dict.fromkeys(wanted) if node in set(before)]

    graph = fx.Graph()
    env = {node: graph.node_copy(node) for node in placeholders}
    modules: dict[str, torch.nn.Module] = {}

    def call(name: str, nodes: list[fx.Node], inputs: list[fx.Node], outputs: list[fx.Node], prefix: str = "") -> None:
        modules[name] = extract_subgraph(gm, nodes, inputs, outputs, prefix)
        result = graph.call_module(name, tuple(env[node] for node in inputs))
        for index, node in enumerate(outputs):
            env[node] = graph.call_function(operator.getitem, (result, index))
            env[node].meta = dict(node.meta)

    call("prologue", before, find_inputs(before), prologue_outputs)
    for index, region in enumerate(regions):
        call(f"blocks.{index}", region.nodes, region.inputs, region.outputs, region.prefix)
    call("epilogue", after, find_inputs(after), [logits])
    graph.output(tuple(env[node] for node in (logits, *presents)))
    graph.lint()
    return LazyGraphModule(modules, graph)


def find_block_nodes(gm: fx.GraphModule) -> list[tuple[str, list[fx.Node]]]:
    """(prefix of the parameters' names, tensor nodes) of every member of the outermost repeated module.

    Raises:
        UnsupportedModelError: no module list with two members or more was entered.
    """
    lists: dict[str, dict[int, list[fx.Node]]] = {}
    for node in gm.graph.nodes:
        if node.op != "call_function" or is_symbolic_int(node):
            continue
        paths = dict.fromkeys(entry[0] for entry in node.meta.get("nn_module_stack", {}).values())
        for match in filter(None, map(_MEMBER.fullmatch, paths)):
            lists.setdefault(match[1], {}).setdefault(int(match[2]), []).append(node)
    repeated = [name for name, members in lists.items() if len(members) > 1]
    if not repeated:
        raise UnsupportedModelError("the model has no repeated decoder block; modcompile routes stacks of equal blocks")
    name = min(repeated, key=lambda name: name.count("."))
    return [(f"{name}.{index}.", nodes) for index, nodes in sorted(lists[name].items())]


def _order_regions(
    blocks: list[tuple[str, list[fx.Node]]], pasts: list[fx.Node], presents: list[fx.Node]
) -> list[_Region]:
    produced: list[list[fx.Node]] = []
    for prefix, nodes in blocks:
        inside = set(nodes)
        used = [node for node in nodes if any(user not in inside for user in node.users)]
        hidden = [node for node in used if node not in presents]
        if len(hidden) != 1:
            raise UnsupportedModelError(
                f"{prefix.rstrip('.')} hands on {len(hidden)} values, where a decoder block hands on one hidden state"
            )
        produced.append([*hidden, *(node for node in presents if node in inside)])

    consumed = [find_inputs(nodes) for _, nodes in blocks]
    for (prefix, _), inputs, previous in zip(blocks[1:], consumed[1:], produced, strict=False):
        if previous[0] not in inputs:
            raise UnsupportedModelError(f"{prefix.rstrip('.')} does not take the hidden state of the block before it")
    position = consumed[1].index(produced[0][0])

    regions = []
    for (prefix, nodes), inputs, outputs in zip(blocks, consumed, produced, strict=True):
        hidden_state = inputs[position]
        own = [node for node in pasts if node in inputs]
        shared = [node for node in inputs if node is not hidden_state and node not in own]
        regions.append(_Region(prefix, nodes, [hidden_state, *shared, *own], outputs))
    return regions


def _split_rest(gm: fx.GraphModule, inside: set[fx.Node]) -> tuple[list[fx.Node], list[fx.Node]]:
    """The tensor nodes outside of all blocks: those that no block leads to, and those that lead to no block."""
    reached: set[fx.Node] = set()
    for node in gm.graph.nodes:
        if any(arg in inside or arg in reached for arg in node.all_input_nodes):
            reached.add(node)
    before: list[fx.Node] = []
    after: list[fx.Node] = []
    for node in gm.graph.nodes:
        if node.op != "call_function" or node in inside or is_symbolic_int(node):
            continue
        (after if node in reached else before).append(node)
    if between := [node for node in after if any(user in inside for user in node.users)]:
        raise UnsupportedModelError(f"{between[0].name} lies between two decoder blocks and belongs to neither")
    return before, after
