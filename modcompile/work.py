"""How much of a model's work each routed layer is."""

from collections.abc import Sequence

from torch import fx, nn

from modcompile.granularity import Granularity, halves_blocks
from modcompile.passes.outlined_form import inner_block


def work_of_layers(soft: fx.GraphModule, layers: Sequence[int], granularity: Granularity) -> dict[int, float]:
    """By layer of a soft graph: 1 for a whole block, and for half of one its share of the whole.

    That is its share of the parameters, with each of which a token takes a product. Keys and values count with the
    attention, though they are computed for skipped tokens, too; so they do where whole blocks are skipped.
    """
    if not halves_blocks(granularity):
        return dict.fromkeys(layers, 1.0)
    work = {}
    for layer in layers:
        mine, other = (_parameters(_block(soft, half)) for half in (layer, layer ^ 1))
        work[layer] = mine / (mine + other)
    return work


def _block(soft: fx.GraphModule, layer: int) -> fx.GraphModule:
    block = soft.get_submodule(f"blocks.{layer}")
    assert isinstance(block, fx.GraphModule)
    return inner_block(inner_block(block)) if hasattr(block, "router") else block


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
