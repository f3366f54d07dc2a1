"""Let a graph run on another device than the one that it was traced on.

Before, traced on the CPU::

    positions = arange(n, device=cpu)

After, for `cuda:0`::

    positions = arange(n, device=cuda:0)

A trace writes the device of every tensor that it makes itself into the graph; moving the parameters does not change it.
"""

import torch
from torch import fx


def retarget_device(gm: fx.GraphModule, device: torch.device) -> bool:
    """Replace every device that `gm` or a GraphModule in it names by `device`, in place; tell whether any changed."""
    modified = False
    for module in gm.modules():
        if isinstance(module, fx.GraphModule) and _retarget(module.graph, device):
            module.recompile()
            modified = True
    return modified


def _retarget(graph: fx.Graph, device: torch.device) -> bool:
    modified = False
    for node in graph.nodes:
        args = tuple(device if isinstance(arg, torch.device) else arg for arg in node.args)
        kwargs = {name: device if isinstance(arg, torch.device) else arg for name, arg in node.kwargs.items()}
        if args != node.args or kwargs != node.kwargs:
            node.args, node.kwargs, modified = args, kwargs, True
    return modified
