"""Let a graph compute in another dtype where it names one.

Before, in a model in float64::

    y = to(rms_norm(to(x, float32)), float64)

After, for float32 → float64::

    y = to(rms_norm(to(x, float64)), float64)

Models name float32 for what must not be rounded more coarsely, whatever their own dtype; a reference in float64 has to
go without.
"""

from typing import Any

import torch
from torch import fx


def retarget_dtype(gm: fx.GraphModule, old: torch.dtype, new: torch.dtype) -> bool:
    """Replace `old` by `new` where `gm` or a GraphModule in it names it, in place; tell whether any was there."""
    modified = False
    for module in gm.modules():
        if isinstance(module, fx.GraphModule):
            modified |= _retarget(module.graph, old, new)
            # Also where nothing was left to replace: modules of one code may share their graph.
            module.recompile()
    return modified


def _retarget(graph: fx.Graph, old: torch.dtype, new: torch.dtype) -> bool:
    def replaced(value: Any) -> Any:
        return new if value is old else value

    modified = False
    for node in graph.nodes:
        args = tuple(map(replaced, node.args))
        kwargs = {name: replaced(value) for name, value in node.kwargs.items()}
        if args != node.args or kwargs != node.kwargs:
            node.args, node.kwargs, modified = args, kwargs, True
    return modified
