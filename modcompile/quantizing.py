"""Quantize the linear layers of a model's decoder blocks."""

from collections.abc import Mapping

import torch
from datasets import Dataset
from torch import fx
from tqdm import tqdm
from transformers import PreTrainedModel

from modcompile.errors import ConfigError, UnsupportedModelError
from modcompile.gptq_blocks import quantize_blocks
from modcompile.passes.extract_subgraph import get_attribute
from modcompile.passes.find_linears import find_linears
from modcompile.passes.outlined_form import block_calls
from modcompile.precision_config import QuantizationConfig
from modcompile.precisions import FULL_PRECISION, MultiPrecisionWeight, quantize_weight
from modcompile.quantized_folder import QuantizedCheckpoint
from modcompile.routed_graph import trace_outlined


def quantize_base(
    base: PreTrainedModel, config: QuantizationConfig, calibration: Dataset | None = None
) -> QuantizedCheckpoint:
    """Quantize every weight that a decoder block multiplies by; embeddings, norms and the head stay as they are.

    Which weights those are is read from the trace, not from the names of modules. `calibration` are the sequences that
    `load_calibration_text` makes for this config; method rtn needs none.

    Raises:
        CheckpointError: what blocks compute of the calibration text is not finite.
        ConfigError: method gptq got no calibration text.
        UnsupportedModelError: the model can't be traced, or its blocks have no such weights.
    """
    linears = find_block_linears(base)
    if not linears:
        raise UnsupportedModelError(f"the decoder blocks of {type(base).__name__} multiply by no weights of their own")
    if not config.needs_calibration:
        weights = _round_to_nearest(base, linears, config)
    elif calibration is None:
        raise ConfigError("--method gptq rounds for a text and got none; give one, or use --method rtn")
    else:
        weights = quantize_blocks(base, config, calibration)
    transposed = frozenset(name for name, is_transposed in linears.items() if is_transposed)
    return QuantizedCheckpoint(base, weights, transposed, config)


def _round_to_nearest(
    base: PreTrainedModel, linears: Mapping[str, bool], config: QuantizationConfig
) -> dict[str, MultiPrecisionWeight]:
    parameters = dict(base.named_parameters())
    weights = {}
    for name, is_transposed in tqdm(linears.items(), "Quantizing", unit="weight", delay=2, leave=False):
        weight = parameters[name].detach()
        weights[name] = quantize_weight(weight.T if is_transposed else weight, config)
    return weights


def find_block_linears(base: PreTrainedModel) -> dict[str, bool]:
    """The names of the weights that decoder blocks multiply by, and whether each is `[in, out]`."""
    names = {id(parameter): name for name, parameter in base.named_parameters()}
    gm = trace_outlined(base)
    found: dict[str, bool] = {}
    for call in block_calls(gm.graph):
        block = gm.get_submodule(str(call.target))
        assert isinstance(block, fx.GraphModule)
        for use in find_linears(block.graph):
            name = names.get(id(get_attribute(block, str(use.weight.target))))
            if name is not None:  # a product with a fixed buffer stays as it is
                found[name] = use.is_transposed
    return found


def relative_errors(checkpoint: QuantizedCheckpoint) -> dict[int, float]:
    """For each precision, the norm of what all weights lost as a share of their norm; the base holds the originals."""
    parameters: Mapping[str, torch.Tensor] = dict(checkpoint.base.named_parameters())
    errors = {}
    for precision in checkpoint.config.precisions:
        lost = total = 0.0
        for name, weight in checkpoint.weights.items():
            original = parameters[name].detach().float()
            original = original.T if name in checkpoint.transposed else original
            total += float(original.square().sum())
            if precision != FULL_PRECISION:
                lost += float((weight.dequantize(precision) - original).square().sum())
        errors[precision] = (lost / total) ** 0.5
    return errors
