"""Read from a graph what its blocks share for attention: tables of a rotary embedding, and which tokens a token sees.

The prologue of a graph in outlined form computes them for the tokens of a call::

    hidden, cos, sin, mask = prologue(input_ids, attention_mask, position_ids, past_key_0)

What is read is what they are for any call, found by running the prologue on some and comparing: a table of cos or sin
has one row for a position, whatever the other tokens are; a mask shows a token the real ones before it and itself, or
the last few of these. So a model's way to write them down does not matter.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx

from modcompile.passes.eliminate_dead_code import eliminate_dead_code
from modcompile.passes.graph_patterns import dtype_of, shape_of
from modcompile.passes.lazy_graph_module import LazyGraphModule
from modcompile.passes.outlined_form import NUM_TOKEN_INPUTS, copy_graph

_sym_size = torch.ops.aten.sym_size.int

ALL = -1
"""The window of a token that sees all tokens before it."""

_POSITION_IDS = 2  # of the inputs of a graph
_PADDED = ([1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 1, 1, 1, 1], [1, 1, 1, 0, 0])


class NotFusedError(Exception):
    """A pattern does not occur as an operator needs it; the message says why, and goes to the user as a note."""


@dataclass(frozen=True)
class AttentionInputs:
    """What the outputs of a prologue are, by their index; those that are in neither are something else."""

    tables: Mapping[int, torch.Tensor]
    """`[max positions, D / 2]`, the first half of a row of cos or sin for each position."""
    windows: Mapping[int, int]
    """For each attention mask how many tokens a token sees, itself included; or `ALL`."""


def read_attention_inputs(gm: fx.GraphModule, max_positions: int) -> AttentionInputs:
    """Which outputs of the prologue of a graph are rotary tables, and which are causal masks.

    `max_positions` is how long a sequence may get.

    Raises:
        NotFusedError: one looks like a table or a mask, and is not.
    """
    prologue = gm.get_submodule("prologue")
    assert isinstance(prologue, fx.GraphModule)
    (call,) = gm.graph.find_nodes(op="call_module", target="prologue")
    order = [gm.graph.find_nodes(op="placeholder").index(argument) for argument in call.args]
    (output,) = prologue.graph.find_nodes(op="output")
    tables, windows = {}, {}
    for index, node in enumerate(output.args[0]):
        part = _part(prologue, index, order)
        if dtype_of(node) == torch.bool and len(shape_of(node)) == 4:
            windows[index] = _window(part, max_positions)
        elif part.reads == {_POSITION_IDS}:
            tables[index] = _table(part, max_positions)
    return AttentionInputs(tables, windows)


@dataclass(frozen=True)
class _Part:
    """What one output of a prologue needs of it."""

    gm: fx.GraphModule
    order: list[int]
    """Which inputs of the whole graph its own are."""
    reads: set[int]
    """Those of them of which it reads more than the sizes."""

    def run(
        self, attention_mask: torch.Tensor, past: int = 0, position_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        """What it makes of tokens behind `past` others."""
        if position_ids is None:
            position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, past:]
        batch, tokens = position_ids.shape
        given = (torch.zeros(batch, tokens, dtype=torch.long), attention_mask, position_ids)
        arguments = []
        for index, node in zip(self.order, self.gm.graph.find_nodes(op="placeholder"), strict=True):
            if index < NUM_TOKEN_INPUTS:
                arguments.append(given[index])
            else:
                _, heads, _, size = node.meta["val"].shape
                arguments.append(torch.zeros(batch, int(heads), past, int(size)))
        tensors = (*self.gm.parameters(), *self.gm.buffers())
        device = tensors[0].device if tensors else torch.device("cpu")
        with torch.no_grad():
            result: torch.Tensor = self.gm(*(argument.to(device) for argument in arguments))
        return result.cpu()


def _part(prologue: fx.GraphModule, index: int, order: list[int]) -> _Part:
    graph, outputs = copy_graph(prologue)
    graph.output(outputs[index])
    eliminate_dead_code(graph)
    inputs = zip(order, graph.find_nodes(op="placeholder"), strict=True)
    reads = {place for place, node in inputs if any(user.target is not _sym_size for user in node.users)}
    return _Part(LazyGraphModule(prologue, graph), order, reads)


def _table(part: _Part, max_positions: int) -> torch.Tensor:
    table = part.run(torch.ones(1, max_positions, dtype=torch.long))[0]
    # The last position may be among the others or not: some embeddings are scaled for the longest sequence of a call.
    for positions in ([[3, 0, max_positions - 1], [1, 1, 2]], [[0, 2, 1]]):
        some = torch.tensor(positions).clamp(max=max_positions - 1)
        if table.dim() != 2 or not torch.equal(part.run(torch.ones_like(some), position_ids=some), table[some]):
            raise NotFusedError("its rotary tables depend on more than a token's own position")
    return table[:, : table.shape[1] // 2].contiguous()


def _window(part: _Part, max_positions: int) -> int:
    last = part.run(torch.ones(1, max_positions, dtype=torch.long), max_positions - 1)
    seen = int(last.sum())
    window = ALL if seen == max_positions else seen
    for rows in (_PADDED, _PADDED[:1]):
        attention_mask = torch.tensor(rows)
        for past in (0, 3, 4):
            mask = part.run(attention_mask, past)
            real = attention_mask[:, past:].bool()[:, None, :, None]
            if not torch.equal(mask & real, _causal(attention_mask, past, window) & real):
                raise NotFusedError("its attention mask is not that of causal attention without padding")
    return window


def _causal(attention_mask: torch.Tensor, past: int, window: int) -> torch.Tensor:
    columns = torch.arange(attention_mask.shape[1])
    rows = columns[past:, None]
    seen = columns <= rows
    if window != ALL:
        seen = seen & (columns > rows - window)
    return attention_mask.bool()[:, None, None, :] & seen
