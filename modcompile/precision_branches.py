"""The versions of a decoder block at several precisions."""

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import fx
from transformers import PreTrainedModel

from modcompile.errors import UnsupportedModelError
from modcompile.passes.extract_subgraph import get_attribute
from modcompile.passes.outlined_form import block_calls
from modcompile.passes.replace_weights import replace_weights
from modcompile.passes.round_activations import round_activations
from modcompile.passes.use_precision import use_precision
from modcompile.precisions import FULL_PRECISION, DequantizableWeight, MultiPrecisionWeight


class PrecisionCheckpoint(Protocol):
    """A base model and its weights at several precisions."""

    @property
    def base(self) -> PreTrainedModel:
        """Holds each weight at the highest precision."""

    @property
    def weights(self) -> Mapping[str, DequantizableWeight]:
        """By the name that the base has for them."""

    @property
    def transposed(self) -> frozenset[str]:
        """Those that the base has as `[in, out]`."""

    @property
    def precisions(self) -> list[int]:
        """The lowest first."""


class PrecisionWeights:
    """The weights of a checkpoint at each of its precisions, dequantized once for all graphs that use them."""

    def __init__(self, checkpoint: PrecisionCheckpoint) -> None:
        self._checkpoint = checkpoint
        self._names = {id(parameter): name for name, parameter in checkpoint.base.named_parameters()}
        self._dense: dict[tuple[str, int], torch.Tensor] = {}

    def branches(self, dense: fx.GraphModule) -> dict[int, dict[int, fx.GraphModule]]:
        """For each block of an outlined graph its versions by their bits, the lowest first; weights are dequantized."""
        return self._versions(dense, self._dequantized)

    def packed_branches(self, dense: fx.GraphModule) -> dict[int, dict[int, fx.GraphModule]]:
        """The same on the codes themselves: slow in PyTorch, and what is exported.

        Raises:
            UnsupportedModelError: they are codes of look-up tables.
        """
        return self._versions(dense, self._packed)

    def rounded_branches(self, dense: fx.GraphModule) -> dict[int, dict[int, fx.GraphModule]]:
        """As `branches`, with activations rounded as ONNX Runtime's products with the codes round them on a CPU.

        Raises:
            UnsupportedModelError: they are codes of look-up tables.
        """
        return self._versions(dense, self._rounded)

    def _versions(
        self, dense: fx.GraphModule, version: Callable[[fx.GraphModule, dict[str, str], int], fx.GraphModule]
    ) -> dict[int, dict[int, fx.GraphModule]]:
        versions: dict[int, dict[int, fx.GraphModule]] = {}
        for layer, call in enumerate(block_calls(dense.graph)):
            block = dense.get_submodule(str(call.target))
            assert isinstance(block, fx.GraphModule)
            names = self._quantized_names(block)
            versions[layer] = {
                precision: block if precision == FULL_PRECISION else version(block, names, precision)
                for precision in self._checkpoint.precisions
            }
        return versions

    def _quantized_names(self, block: fx.GraphModule) -> dict[str, str]:
        """What the checkpoint calls the block's parameters that it has quantized."""
        named = {}
        for node in block.graph.find_nodes(op="get_attr"):
            name = self._names.get(id(get_attribute(block, str(node.target))))
            if name is not None and name in self._checkpoint.weights:
                named[str(node.target)] = name
        return named

    def _dequantized(self, block: fx.GraphModule, names: dict[str, str], precision: int) -> fx.GraphModule:
        dtype = next(block.parameters()).dtype
        weights = {target: self._at(name, precision, dtype) for target, name in names.items()}
        return replace_weights(block, weights, str(precision))

    def _packed(self, block: fx.GraphModule, names: dict[str, str], precision: int) -> fx.GraphModule:
        return use_precision(block, self._codes(names), precision)

    def _rounded(self, block: fx.GraphModule, names: dict[str, str], precision: int) -> fx.GraphModule:
        sizes = {get_attribute(block, name): weight.group_size for name, weight in self._codes(names).items()}
        return self._dequantized(round_activations(block, sizes), names, precision)

    def _codes(self, names: dict[str, str]) -> dict[str, MultiPrecisionWeight]:
        """The weights by the names that the block has for them."""
        weights = {}
        for target, name in names.items():
            weight = self._checkpoint.weights[name]
            if not isinstance(weight, MultiPrecisionWeight):
                raise UnsupportedModelError(
                    f"{name} is looked up in tables, which PyTorch alone serves; to export, quantize the original "
                    "with modcompile.quantize"
                )
            weights[target] = weight
        return weights

    def _at(self, name: str, precision: int, dtype: torch.dtype) -> torch.Tensor:
        if (name, precision) not in self._dense:
            dense = self._checkpoint.weights[name].dequantize(precision).to(self._checkpoint.base.device, dtype)
            self._dense[name, precision] = dense.T if name in self._checkpoint.transposed else dense
        return self._dense[name, precision]
