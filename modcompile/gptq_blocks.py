"""Quantize the decoder blocks of a model one after the other, then its head, each for the inputs that a text gives."""

import copy
from typing import TYPE_CHECKING

import torch
from torch import fx
from tqdm import tqdm
from transformers import PreTrainedModel

from modcompile.block_inputs import BlockInputs
from modcompile.errors import CheckpointError
from modcompile.gptq import factor_inverse
from modcompile.passes.extract_subgraph import get_attribute
from modcompile.passes.find_linears import find_linears
from modcompile.passes.outlined_form import block_calls
from modcompile.passes.replace_weights import replace_weights
from modcompile.precision_config import QuantizationConfig
from modcompile.precisions import MultiPrecisionWeight, quantize_weight
from modcompile.routed_graph import trace_outlined

if TYPE_CHECKING:  # it takes half a second to import
    from datasets import Dataset


def quantize_blocks(
    base: PreTrainedModel, config: QuantizationConfig, calibration: "Dataset", *, with_head: bool = False
) -> dict[str, MultiPrecisionWeight]:
    """Quantize every weight that a block multiplies by, by the names that `base` has for them; on demand the head, too.

    A block's inputs are what the blocks before it compute at the lowest precision, so that it is rounded for inputs
    that are already off: those of the precision that has the most to lose. All is computed in float32, as quantized
    folders are read. A head that takes more than what blocks do is left out.

    Raises:
        CheckpointError: the inputs of a weight hold NaN or infinity.
        UnsupportedModelError: the model can't be traced, or is no chain of decoder blocks.
    """
    if any(parameter.dtype != torch.float32 for parameter in base.parameters()):
        base = copy.deepcopy(base).float()
    names = {id(parameter): name for name, parameter in base.named_parameters()}
    gm = trace_outlined(base, use_cache=False)
    inputs = BlockInputs(gm, calibration)
    weights: dict[str, MultiPrecisionWeight] = {}
    calls = block_calls(gm.graph)
    heads = gm.graph.find_nodes(op="call_module", target="epilogue") if with_head else []
    for call in tqdm([*calls, *filter(inputs.suit, heads)], "Quantizing", unit="block", delay=2, leave=False):
        block = gm.get_submodule(str(call.target))
        assert isinstance(block, fx.GraphModule)
        # A product with a fixed buffer stays as it is.
        uses = [use for use in find_linears(block.graph) if id(get_attribute(block, str(use.weight.target))) in names]
        hessians = inputs.hessians(call, block, uses)
        lowest: dict[str, torch.Tensor] = {}
        for use in uses:
            target = str(use.weight.target)
            tensor = get_attribute(block, target)
            name = names[id(tensor)]
            if name not in weights:  # what several blocks share is rounded for the first
                weight = tensor.detach()
                factor = _factor(hessians.pop(use), name)
                weights[name] = quantize_weight(weight.T if use.is_transposed else weight, config, factor)
            dense = weights[name].dequantize(config.precisions[0])
            lowest[target] = dense.T if use.is_transposed else dense
        if call not in heads:
            inputs.advance(call, replace_weights(block, lowest, str(config.precisions[0])))
    return weights


def _factor(hessian: torch.Tensor, name: str) -> torch.Tensor:
    try:
        return factor_inverse(hessian)
    except ValueError as error:
        raise CheckpointError(
            f"the inputs of {name} on the calibration text are no finite numbers ({error}); check the checkpoint, or "
            "round to nearest (rtn)"
        ) from error
