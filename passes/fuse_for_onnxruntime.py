"""Fuse what ONNX Runtime has an operator for beyond those of the ONNX standard.

Before, as `fuse_operators` leaves it, in every block and branch::

    linear, linear, linear, RotaryEmbedding, RotaryEmbedding, Attention, linear, add, rms_norm, …

After::

    linear, group_query_attention, linear, skip_rms_norm, linear, split, silu, mul, linear, skip_rms_norm

A pattern that does not occur in all blocks is left as it is; it is told which, and why.
"""

from dataclasses import dataclass

from torch import fx

from modcompile.passes.align_rows import align_rows
from modcompile.passes.carry_norms import carry_norms
from modcompile.passes.fuse_group_query_attention import fuse_group_query_attention
from modcompile.passes.fuse_skip_norm import fuse_skip_norm
from modcompile.passes.lazy_graph_module import LazyGraphModule
from modcompile.passes.nested_graphs import map_graphs
from modcompile.passes.outlined_form import copy_graph
from modcompile.passes.pack_linears import pack_linears
from modcompile.passes.read_attention_inputs import NotFusedError
from modcompile.stages import stage


@dataclass(frozen=True)
class Fused:
    """A graph, and what became of its patterns."""

    gm: fx.GraphModule
    updates_in_place: bool
    """Whether past and present keys and values may be one buffer."""
    unfused: tuple[str, ...]
    """For a person: what was not found, and why."""


@stage("fusing for ONNX Runtime")
def fuse_for_onnxruntime(gm: fx.GraphModule, max_positions: int) -> Fused:
    """Fuse a graph that `fuse_operators` has returned; parameters are shared with it.

    `max_positions` is how long a sequence may get.

    Keeps equal: logits and routing masks of tokens that are no padding, but for rounding; and without padding, keys and
    values.
    """
    unfused = []
    updates_in_place = True
    try:
        gm = align_rows(fuse_group_query_attention(gm, max_positions))
    except NotFusedError as error:
        updates_in_place = False
        unfused.append(f"attention: {error}")
    gm = map_graphs(pack_linears(carry_norms(gm)), _with_skip_norms)
    return Fused(gm, updates_in_place, tuple(unfused))


def _with_skip_norms(gm: fx.GraphModule) -> fx.GraphModule:
    graph, outputs = copy_graph(gm)
    graph.output(outputs)
    fuse_skip_norm(graph)
    return LazyGraphModule(gm, graph)
