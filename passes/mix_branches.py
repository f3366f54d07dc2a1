"""One graph for several versions of a block, in which each token has its own mixture of them.

Before::

    hidden_0, key_0, value_0 = branch_0(hidden, …, past_key, past_value)
    hidden_1, key_1, value_1 = branch_1(hidden, …, past_key, past_value)

After::

    key = combine(selection, key_0, key_1);  value = combine(selection, value_0, value_1)     # of the new tokens
    hidden = combine(selection, hidden_0, hidden_1)

where each version attends to the mixed keys and values. So those of a token are what the token itself selected, whoever
attends to them, and a later call finds in the cache what this one has attended to. What the versions have in common is
computed once (`merge_branches`).
"""

from collections.abc import Iterable, Sequence

import torch
from torch import fx, nn

from modcompile.passes.extract_subgraph import get_attribute
from modcompile.passes.lazy_graph_module import LazyGraphModule
from modcompile.passes.merge_branches import merge_branches
from modcompile.passes.outlined_form import num_outputs

_aten = torch.ops.aten


class WeightedSum(nn.Module):
    """`weights [B, S, P]` (S is T, or 1 for all tokens of a row) and P values `[B, T, H]` → their sum `[B, T, H]`."""

    def forward(self, weights: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        total = weights[..., :1] * values[0]
        for index, value in enumerate(values[1:], start=1):
            total = total + weights[..., index : index + 1] * value
        return total


class SelectByIndex(nn.Module):
    """`selection [B, T, 1]`, an index for each token, and P values `[B, T, H]` → the value of that index."""

    def forward(self, selection: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        selected, *rest = values
        for index, value in enumerate(rest, start=1):
            selected = torch.where(selection == index, value, selected)
        return selected


class CombineCache(nn.Module):
    """The same of keys or values `[B, heads, past + T, D]`; those of the past are alike in all versions, and kept."""

    def __init__(self, combine: nn.Module) -> None:
        super().__init__()
        self.combine = combine

    def forward(self, hidden: torch.Tensor, selection: torch.Tensor, *presents: torch.Tensor) -> torch.Tensor:
        past = presents[0].shape[2] - hidden.shape[1]
        new = self.combine(selection.unsqueeze(1), *(present[:, :, past:] for present in presents))
        return torch.cat([presents[0][:, :, :past], new], 2)


def mix_branches(branches: Sequence[fx.GraphModule], combine: nn.Module) -> fx.GraphModule:
    """A flat GraphModule that takes what a branch takes, then the selection, and returns what a branch returns.

    `combine` is `WeightedSum` or `SelectByIndex`, which say what a selection is.

    Keeps equal: where all tokens select one version alone, its outputs.
    """
    merged = merge_branches(branches)
    (output,) = merged.graph.find_nodes(op="output")
    width = num_outputs(merged) // len(branches)
    hidden_states, *caches = (output.args[0][index::width] for index in range(width))
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    _copy(merged.graph.find_nodes(op="placeholder"), graph, env)
    hidden = next(iter(env.values()))
    selection = graph.placeholder("selection")
    body = [node for node in merged.graph.nodes if node.op not in ("placeholder", "output")]
    first = _ancestors(caches)
    _copy([node for node in body if node in first], graph, env)
    mixed = []
    for presents in caches:
        versions = [env[present] for present in presents]
        mixed.append(graph.call_module("combine_cache", (hidden, selection, *versions)))
        mixed[-1].meta = dict(versions[0].meta)
    for presents, node in zip(caches, mixed, strict=True):
        env |= dict.fromkeys(presents, node)
    _copy([node for node in body if node not in env], graph, env)
    graph.output((graph.call_module("combine", (selection, *(env[state] for state in hidden_states))), *mixed))
    modules = {"combine": combine, "combine_cache": CombineCache(combine)}
    held = {str(node.target): node.op for node in body if node.op in ("get_attr", "call_module")}
    return LazyGraphModule(modules | {name: get_attribute(merged, name) for name in held}, graph)


def _copy(nodes: Iterable[fx.Node], graph: fx.Graph, env: dict[fx.Node, fx.Node]) -> None:
    for node in nodes:
        env[node] = graph.node_copy(node, env.__getitem__)
        if node.target is _aten.view.default:
            # Strides of what follows from mixed keys may be others than those that the trace has seen.
            env[node].target = _aten.reshape.default


def _ancestors(groups: Iterable[Sequence[fx.Node]]) -> set[fx.Node]:
    """The nodes of all groups, and what they are computed from."""
    found: set[fx.Node] = set()
    waiting = [node for group in groups for node in group]
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting.extend(node.all_input_nodes)
    return found
