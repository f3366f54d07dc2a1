"""Round the weights of a model as its artifact will hold them."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

from modcompile.export.export_config import WeightRounding
from modcompile.gptq_blocks import quantize_blocks
from modcompile.passes.quantize_weights import find_weights
from modcompile.precision_config import QuantizationConfig
from modcompile.precisions import PackedWeight
from modcompile.quantization import quantize
from modcompile.torch_threads import torch_threads

if TYPE_CHECKING:  # it takes half a second to import
    from datasets import Dataset


@torch.no_grad()
def round_weights(
    *modules: nn.Module, rounding: WeightRounding, rounded: Mapping[nn.Parameter, PackedWeight] | None = None
) -> dict[nn.Parameter, PackedWeight]:
    """Round, in place, every parameter that the graphs in `modules` multiply by or look tokens up in.

    To the codes in `rounded`, and to nearest what is not there. Returned are the codes of all, `[out, in]` whichever
    way round the parameter is: what the model then computes is what an artifact on these codes is to compute. One
    parameter that several nodes read is rounded once.
    """
    codes = {}
    weights = find_weights(*modules).items()
    # Memory is what this takes time for: threads share it and wait for each other, with two it takes twice as long, and
    # many times as long on a machine that others use.
    with torch_threads(1):
        for weight, is_transposed in tqdm(weights, "Rounding", unit="weight", delay=2, leave=False):
            stored = weight.T if is_transposed else weight
            packed = (rounded or {}).get(weight)
            if packed is None:
                packed = PackedWeight.of(
                    quantize(stored, rounding.num_bits, rounding.group_size, symmetric=rounding.symmetric)
                )
            stored.copy_(packed.dequantize(stored.shape[1]))
            codes[weight] = packed
    return codes


def round_for_text(
    base: PreTrainedModel, rounding: WeightRounding, calibration: "Dataset"
) -> dict[nn.Parameter, PackedWeight]:
    """The codes, by GPTQ, of what the blocks and the head of `base` multiply by; `base` is left alone.

    Raises:
        CheckpointError: what blocks compute of the text is not finite.
        UnsupportedModelError: the model can't be traced, or is no chain of decoder blocks.
    """
    config = calibrated(rounding)
    weights = quantize_blocks(base, config, calibration, with_head=True)
    return {base.get_parameter(name): weight.parts[rounding.num_bits] for name, weight in weights.items()}


def calibrated(rounding: WeightRounding) -> QuantizationConfig:
    """What `modcompile.quantize` would take for the same rounding of blocks."""
    return QuantizationConfig(
        precisions=[rounding.num_bits], group_size=rounding.group_size, symmetric=rounding.symmetric, method="gptq"
    )
