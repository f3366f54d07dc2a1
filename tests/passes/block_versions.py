"""Versions of a block to choose from, and graphs with blocks in the place of others."""

from torch import fx

from modcompile.passes.outlined_form import called_modules, copy_graph
from modcompile.passes.replace_weights import replace_weights

_BITS = (4, 8, 16)


def branches_of(dense: fx.GraphModule, layer: int) -> dict[int, fx.GraphModule]:
    """Three versions of a block, the last of which is itself."""
    block = dense.get_submodule(f"blocks.{layer}")
    assert isinstance(block, fx.GraphModule)
    weights = {name: tensor.detach() for name, tensor in block.named_parameters() if tensor.dim() == 2}
    scaled = [
        replace_weights(block, {name: tensor * factor for name, tensor in weights.items()}, suffix)
        for suffix, factor in (("4", 0.5), ("8", 0.9))
    ]
    return dict(zip(_BITS, (*scaled, block), strict=True))


def with_blocks(dense: fx.GraphModule, blocks: dict[int, fx.GraphModule]) -> fx.GraphModule:
    graph, outputs = copy_graph(dense)
    graph.output(outputs)
    return fx.GraphModule(called_modules(dense) | {f"blocks.{layer}": block for layer, block in blocks.items()}, graph)
