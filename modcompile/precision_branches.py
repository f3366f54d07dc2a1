"""The versions of a decoder block at several precisions."""

import torch
from torch import fx

from modcompile.passes.extract_subgraph import get_attribute
from modcompile.passes.outlined_form import block_calls
from modcompile.passes.replace_weights import replace_weights
from modcompile.precisions import FULL_PRECISION
from modcompile.quantized_folder import QuantizedCheckpoint


class PrecisionWeights:
    """The weights of a checkpoint at each of its precisions, dequantized once for all graphs that use them."""

    def __init__(self, checkpoint: QuantizedCheckpoint) -> None:
        self._checkpoint = checkpoint
        self._names = {id(parameter): name for name, parameter in checkpoint.base.named_parameters()}
        self._dense: dict[tuple[str, int], torch.Tensor] = {}

    def branches(self, dense: fx.GraphModule) -> dict[int, dict[str, fx.GraphModule]]:
        """For each block of an outlined graph its versions, the lowest precision first, by `"4"`, `"8"` and so on."""
        return {
            layer: {
                str(precision): self._version(dense.get_submodule(str(call.target)), precision)
                for precision in self._checkpoint.config.precisions
            }
            for layer, call in enumerate(block_calls(dense.graph))
        }

    def _version(self, block: torch.nn.Module, precision: int) -> fx.GraphModule:
        assert isinstance(block, fx.GraphModule)
        if precision == FULL_PRECISION:
            return block
        replaced = {}
        for node in block.graph.find_nodes(op="get_attr"):
            tensor = get_attribute(block, str(node.target))
            name = self._names.get(id(tensor))
            if name is not None and name in self._checkpoint.weights:
                replaced[str(node.target)] = self._at(name, precision, tensor.dtype)
        return replace_weights(block, replaced, str(precision))

    def _at(self, name: str, precision: int, dtype: torch.dtype) -> torch.Tensor:
        if (name, precision) not in self._dense:
            dense = self._checkpoint.weights[name].dequantize(precision).to(dtype)
            self._dense[name, precision] = dense.T if name in self._checkpoint.transposed else dense
        return self._dense[name, precision]
