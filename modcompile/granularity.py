"""What a gate decides on: a whole decoder block, or one of its halves, its attention and its MLP.

Where blocks are halved, a layer in the sense of gates, graphs and artifacts is half of one of the model's: what attends
in layer i is layer 2 i, its MLP is layer 2 i + 1.
"""

from typing import Literal

Granularity = Literal["block", "attn", "mlp", "attn+mlp"]

_HALVES = ("attn", "mlp")
GRANULARITIES: tuple[Granularity, ...] = ("block", "attn", "mlp", "attn+mlp")


def halves_blocks(granularity: Granularity) -> bool:
    """Whether layers are halves of the model's."""
    return granularity != "block"


def halves_of(layer: int, granularity: Granularity) -> list[int]:
    """What a gate decides on of a layer of the model; the layer itself, if blocks are whole."""
    if not halves_blocks(granularity):
        return [layer]
    return [2 * layer + half for half, name in enumerate(_HALVES) if name in granularity.split("+")]


def layer_of(layer: int, granularity: Granularity) -> int:
    """The layer of the model that this is half of, or all of."""
    return layer // 2 if halves_blocks(granularity) else layer


def label_of(layer: int, granularity: Granularity) -> str:
    """For a person: `3`, or of halves `1.mlp`."""
    return f"{layer // 2}.{_HALVES[layer % 2]}" if halves_blocks(granularity) else str(layer)
