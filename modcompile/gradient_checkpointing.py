"""Trade time for memory: recompute blocks in the backward pass."""

from functools import partial

from torch import fx
from torch.utils.checkpoint import checkpoint

from modcompile.passes.outlined_form import block_calls


def checkpoint_blocks(gm: fx.GraphModule, *, enabled: bool) -> None:
    """Let every block of a graph in outlined form keep its inputs only, or all its activations again, in place."""
    for call in block_calls(gm.graph):
        block = gm.get_submodule(str(call.target))
        vars(block).pop("forward", None)
        if enabled:
            # On the instance: names of parameters, and the graph, stay as they are.
            vars(block)["forward"] = partial(checkpoint, type(block).forward.__get__(block), use_reentrant=False)
