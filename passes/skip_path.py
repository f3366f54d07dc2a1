"""What a token goes through in the place of a block that it skips.

It is the child `skip` of a `mixed_block`, a `masked_block` and a `skip_block`, a module that maps a hidden state
`[B, T, H]` to another, each token by itself. Without that child it is the identity.
"""

from torch import fx, nn

_SKIP = "skip"


def skip_of(block: nn.Module) -> nn.Module | None:
    """The module of a mixed or masked block, or None for the identity."""
    return dict(block.named_children()).get(_SKIP)


def skip_child(skip: nn.Module | None) -> dict[str, nn.Module]:
    """What a block's children are to hold for it."""
    return {} if skip is None else {_SKIP: skip}


def call_skip(graph: fx.Graph, hidden: fx.Node, skip: nn.Module | None) -> fx.Node:
    """The hidden state of a token that is skipped, as a node of `graph`."""
    if skip is None:
        return hidden
    skipped = graph.call_module(_SKIP, (hidden,))
    skipped.meta = dict(hidden.meta)
    return skipped
