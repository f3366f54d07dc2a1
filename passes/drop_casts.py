"""Drop the casts to the dtype that a tensor has.

Before, in float32::

    y = to(rms_norm(to(x, float32)), float32)

After::

    y = rms_norm(x)

Models write norms and rotary embeddings for any dtype; in the one that was traced, most of the casts do nothing but
stand between operators that belong together.
"""

import torch
from torch import fx

from modcompile.passes.graph_patterns import dtype_of, is_call

_to_dtype = torch.ops.aten.to.dtype


def drop_casts(graph: fx.Graph) -> int:
    """Drop them in place; return how many.

    Keeps equal: every value, bit for bit, for inputs of the dtypes that were traced.
    """
    dropped = 0
    for node in list(graph.nodes):
        # A third argument asks for a copy, or a memory format.
        if is_call(node, _to_dtype) and len(node.args) == 2 and not node.kwargs:
            source, dtype = node.args
            if isinstance(source, fx.Node) and dtype_of(source) == dtype:
                node.replace_all_uses_with(source)
                graph.erase_node(node)
                dropped += 1
    return dropped
