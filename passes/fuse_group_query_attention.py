"""One operator for attention, its rotary embedding and the update of its cache, in blocks and in all their branches.

Before, as `fuse_operators` leaves it::

    hidden, cos, sin, mask = prologue(input_ids, attention_mask, position_ids, past_key_0)
    hidden, key_0, value_0 = blocks.0(hidden, cos, sin, mask, past_key_0, past_value_0)

After::

    seqlens_k, total_sequence_length = attention_lengths.3(input_ids, attention_mask)
    hidden, … = prologue(input_ids, attention_mask, position_ids, past_key_0)
    hidden, key_0, value_0 = blocks.0(
        hidden, cos_table, sin_table, seqlens_k, past_key_0, past_value_0, total_sequence_length
    )

with, in each block and branch, what `cached_attention` makes of it; the tables are constants, a row for each position.

The operator keeps the tokens of a row in its first slots, so padding must come after them: see `align_rows`. In return
its cache may be updated in place, and a position is never computed.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

from modcompile.passes.cached_attention import TABLE, CacheInputs, Role, fuse_cached_attention
from modcompile.passes.cancel_layouts import cancel_layouts
from modcompile.passes.eliminate_dead_code import eliminate_dead_code
from modcompile.passes.extract_subgraph import get_attribute
from modcompile.passes.graph_calls import append_arguments, append_placeholders, calls_of
from modcompile.passes.lazy_graph_module import LazyGraphModule
from modcompile.passes.outlined_form import block_calls, called_modules, copy_graph, getitems, results
from modcompile.passes.read_attention_inputs import NotFusedError, read_attention_inputs

_TOTAL = "total_sequence_length"


class AttentionLengths(nn.Module):
    """`input_ids [B, T]`, `attention_mask [B, P + T]` → `seqlens_k [B]` and `total_sequence_length`, int32.

    The new tokens follow the real ones of the past, whatever the mask says of them: padding behind a prompt is kept
    where no token sees it, until another takes its slot.
    """

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, total = input_ids.shape[1], attention_mask.shape[1]
        seqlens_k = attention_mask[:, : total - tokens].sum(1) + (tokens - 1)
        return seqlens_k.int(), torch.full((), total, dtype=torch.int32, device=input_ids.device)


def fuse_group_query_attention(gm: fx.GraphModule, max_positions: int) -> fx.GraphModule:
    """Return the graph, in outlined form or lowered, with one operator for attention; parameters are shared with `gm`.

    `max_positions` is how long a sequence may get: the length of the tables.

    Keeps equal: every output, but for rounding, where no row has padding before its tokens.

    Raises:
        NotFusedError: some block or branch does not have the pattern.
    """
    shared = read_attention_inputs(gm, max_positions)
    if not shared.windows:
        raise NotFusedError("it makes no attention mask")
    graph, outputs = copy_graph(gm)
    (call,) = graph.find_nodes(op="call_module", target="prologue")
    modules: dict[str, Any] = dict(called_modules(gm))
    modules |= {str(node.target): get_attribute(gm, str(node.target)) for node in graph.find_nodes(op="get_attr")}
    modules |= {f"rotary_table_{index}": table for index, table in shared.tables.items()}
    roles: dict[fx.Node, Role] = {}
    input_ids, attention_mask, *_ = graph.find_nodes(op="placeholder")
    with graph.inserting_before(call):
        for value in results(call):
            index = int(str(value.args[1]))
            if index in shared.tables:
                table = graph.get_attr(f"rotary_table_{index}")
                value.replace_all_uses_with(table)
                roles[table] = TABLE
            elif index in shared.windows:
                # A call of its own for each mask, so that each has its own window.
                name = f"attention_lengths.{index}"
                modules[name] = AttentionLengths()
                lengths, total = getitems(graph.call_module(name, (input_ids, attention_mask)), 2)
                value.replace_all_uses_with(lengths)
                roles[lengths] = shared.windows[index]
    for block in block_calls(graph):
        module = gm.get_submodule(str(block.target))
        assert isinstance(module, fx.GraphModule)
        modules[str(block.target)] = _fuse(module, [_role(argument, roles) for argument in block.args])
        append_arguments(block, [total])
    graph.output(outputs)
    eliminate_dead_code(graph)
    graph.lint()
    return LazyGraphModule(modules, graph)


def _fuse(gm: fx.GraphModule, given: Sequence[Role | None]) -> fx.GraphModule:
    """The graph with one more input, `total_sequence_length`; `given` says what its inputs are."""
    graph, outputs = copy_graph(gm)
    inputs = graph.find_nodes(op="placeholder")
    roles = {node: role for node, role in zip(inputs, given, strict=True) if role is not None}
    (total,) = append_placeholders(graph, [_TOTAL])
    children: dict[str, Any] = {}
    for node in graph.nodes:
        calls = calls_of(node)
        if not any(argument in roles for _, arguments in calls for argument in arguments):
            continue
        for target, arguments in calls:
            child = gm.get_submodule(target)
            if not isinstance(child, fx.GraphModule):
                raise NotFusedError(f"{target} reads a rotary table or the attention mask")
            children[target] = _fuse(child, [_role(argument, roles) for argument in arguments])
        append_arguments(node, [total])
    graph.output(outputs)
    fuse_cached_attention(graph, CacheInputs(roles, total))
    cancel_layouts(graph)
    eliminate_dead_code(graph)
    _check_inputs(roles, children)
    names = {str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr")}
    return LazyGraphModule({name: children.get(name) or get_attribute(gm, name) for name in names}, graph)


def _check_inputs(roles: dict[fx.Node, Role], children: dict[str, Any]) -> None:
    """Nothing but attention, and what is called, may read what is no longer what it was."""
    for node in roles:
        for user in node.users:
            fused = user.target is torch.ops.modcompile.group_query_attention.default
            if not fused and not any(target in children for target, _ in calls_of(user)):
                raise NotFusedError(f"{user.target} reads a rotary table or the attention mask")


def _role(argument: Any, roles: dict[fx.Node, Role]) -> Role | None:
    return roles.get(argument) if isinstance(argument, fx.Node) else None
