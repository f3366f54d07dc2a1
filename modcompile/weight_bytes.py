"""How many bytes of weights a token makes a model of several precisions read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import fx, nn

from modcompile.layerwise import LayerwiseQuantizeForCausalLM
from modcompile.passes.cond_chain import branches_of_chain
from modcompile.passes.outlined_form import block_calls

_SKIPPED = 0
_FLOAT_BYTES = 2


@dataclass(frozen=True)
class WeightBytes:
    """Codes as they are packed, and 2 bytes for what is not rounded: of 16 bits, norms, scales, routers, adapters."""

    blocks: tuple[Mapping[int, int], ...]
    """Of each block, by the bits that a token has there; 0 where it is skipped, which reads what keys and values need,
    and the adapter."""
    rest: int
    """Of what every token goes through: routers and head. Of the embedding it reads a row."""

    def per_token(self, shares: Sequence[Mapping[int, float]]) -> float:
        """The mean over tokens, from their shares by bits for each block."""
        read = [
            share * by_bits[bits]
            for by_bits, of_block in zip(self.blocks, shares, strict=True)
            for bits, share in of_block.items()
        ]
        return self.rest + sum(read)


def weight_bytes(model: LayerwiseQuantizeForCausalLM) -> WeightBytes:
    """What `model.export_graph()` reads.

    Raises:
        UnsupportedModelError: its codes are those of look-up tables, which are not exported.
    """
    graph = model.export_graph()
    blocks, rest = [], _bytes_of(graph.get_submodule("epilogue"))
    for layer, call in enumerate(block_calls(graph.graph)):
        block = graph.get_submodule(str(call.target))
        assert isinstance(block, fx.GraphModule)
        rest += _bytes_of(block.get_submodule("decide"))
        skipped = [_SKIPPED] if layer in model.depth_routers else []
        # One more branch, if there is one, is for calls whose tokens differ.
        versions = zip([*skipped, *model.precisions], branches_of_chain(block), strict=False)
        blocks.append({bits: _bytes_of(version) for bits, version in versions})
    return WeightBytes(tuple(blocks), rest)


def _bytes_of(module: nn.Module) -> int:
    held = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return sum(
        tensor.numel() * (_FLOAT_BYTES if tensor.is_floating_point() else tensor.element_size())
        for tensor in held.values()
    )
