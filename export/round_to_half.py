"""Round the weights of a model to what float16 holds, as its artifact will store them."""

import torch
from torch import nn

from modcompile.errors import UnsupportedModelError
from modcompile.passes.quantize_weights import find_weights


@torch.no_grad()
def round_to_half(graph: nn.Module) -> None:
    """Round, in place, every float32 parameter that the graph multiplies by or looks tokens up in.

    Raises:
        UnsupportedModelError: a weight is too large for float16.
    """
    for weight in find_weights(graph):
        rounded = weight.half().float()
        if not rounded.isfinite().all():
            raise UnsupportedModelError(
                f"a weight is {float(weight.abs().max()):g}, and float16 ends at 65504; export with --weights fp32"
            )
        weight.copy_(rounded)
