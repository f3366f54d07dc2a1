"""Let whoever runs a graph say of how many tokens it wants the logits.

Before::

    logits = epilogue(hidden)

After, with the buffer `logits_to_keep [1]` (int64) of the graph, at first a number that no sequence reaches::

    logits = epilogue(last_tokens(hidden, logits_to_keep))

To go on with a prompt takes the logits of its last token; those of all the others are a good part of its work.
"""

import sys

import torch
from torch import fx

from modcompile.passes.extract_subgraph import get_attribute
from modcompile.passes.lazy_graph_module import LazyGraphModule
from modcompile.passes.outlined_form import called_modules, copy_graph

LOGITS_TO_KEEP = "logits_to_keep"


@torch.library.custom_op("modcompile::last_tokens", mutates_args=())
def last_tokens(x: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """The last `count [1]` (int64) tokens of `x [B, T, …]`, or all where there are fewer."""
    return x[:, max(0, x.shape[1] - int(count)) :].clone()


LAST_TOKENS = torch.ops.modcompile.last_tokens.default


def keep_last_logits(gm: fx.GraphModule) -> fx.GraphModule:
    """Return the graph, in outlined form or lowered, with a buffer that limits its logits; parameters are shared.

    Keeps equal: the logits that are kept, and every other output.
    """
    graph, outputs = copy_graph(gm)
    (epilogue,) = graph.find_nodes(op="call_module", target="epilogue")
    hidden = epilogue.args[0]
    assert isinstance(hidden, fx.Node)
    with graph.inserting_before(epilogue):
        last = graph.call_function(LAST_TOKENS, (hidden, graph.get_attr(LOGITS_TO_KEEP)))
    last.meta = dict(hidden.meta)
    epilogue.replace_input_with(hidden, last)
    graph.output(outputs)
    names = {str(node.target) for node in graph.find_nodes(op="get_attr")} - {LOGITS_TO_KEEP}
    device = next(gm.parameters()).device
    buffers = {LOGITS_TO_KEEP: torch.tensor([sys.maxsize], device=device)}
    attributes = {name: get_attribute(gm, name) for name in names}
    return LazyGraphModule({**called_modules(gm), **attributes, **buffers}, graph)
