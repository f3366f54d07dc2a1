"""What a model returns whose blocks choose their precision."""

from dataclasses import dataclass

import torch
from transformers.modeling_outputs import CausalLMOutputWithPast


@dataclass
class PrecisionCausalLMOutput(CausalLMOutputWithPast):
    """Adds what the routers decided, one tensor a block.

    In training, the weights of the precisions, `[B, 1, P]` for sequences or `[B, T, P]` for tokens, and the gates
    `[B, T, 1]` of those layers that have one; otherwise the bits that each token was computed with, int64 `[B, T]`, 0
    where it was skipped.
    """

    precision_weights: tuple[torch.Tensor, ...] | None = None
    gates: dict[int, torch.Tensor] | None = None
    num_bits: tuple[torch.Tensor, ...] | None = None
    tokens: torch.Tensor | None = None
