"""Round the weights of a model as its artifact will hold them."""

import torch
from torch import nn
from tqdm import tqdm

from modcompile.export.export_config import WeightRounding
from modcompile.passes.quantize_weights import find_weights
from modcompile.precisions import PackedWeight
from modcompile.quantization import quantize


@torch.no_grad()
def round_weights(*modules: nn.Module, rounding: WeightRounding) -> dict[nn.Parameter, PackedWeight]:
    """Round to nearest, in place, every parameter that the graphs in `modules` multiply by or look tokens up in.

    Returned are the codes, `[out, in]` whichever way round the parameter is: what the model then computes is what an
    artifact on these codes is to compute. One parameter that several nodes read is rounded once.
    """
    rounded = {}
    for weight, is_transposed in tqdm(find_weights(*modules).items(), "Rounding", unit="weight", delay=2, leave=False):
        stored = weight.T if is_transposed else weight
        quantized = quantize(stored, rounding.num_bits, rounding.group_size, symmetric=rounding.symmetric)
        stored.copy_(quantized.dequantize(stored.shape[1]))
        rounded[weight] = PackedWeight.of(quantized)
    return rounded
