"""A router of precisions on codes of 8 bits, for export: what it reads is then little beside its block."""

import torch
from torch import nn

from modcompile.passes.quantized_ops import MATMUL_NBITS
from modcompile.precision_routers import PrecisionRouter, RoundedLinear, mean_of_tokens


class PackedRouter(nn.Module):
    """The same as a `PrecisionRouter` out of training."""

    def __init__(self, router: PrecisionRouter) -> None:
        super().__init__()
        self.for_tokens = router.for_tokens
        self.first, self.second = _PackedLinear(router.first), _PackedLinear(router.second)
        self.last = router.last

    def forward(self, hidden_state: torch.Tensor, token_weights: torch.Tensor) -> torch.Tensor:
        x = hidden_state if self.for_tokens else mean_of_tokens(hidden_state, token_weights)
        logits: torch.Tensor = self.last(torch.relu(self.second(torch.relu(self.first(x)))))
        return logits if self.for_tokens else logits.unsqueeze(1)


class _PackedLinear(nn.Module):
    packed: torch.Tensor
    scales: torch.Tensor
    bias: torch.Tensor

    def __init__(self, linear: RoundedLinear) -> None:
        super().__init__()
        weight = linear.packed()
        self.num_bits = weight.num_bits
        for name, tensor in (("packed", weight.packed), ("scales", weight.scales), ("bias", linear.bias.detach())):
            self.register_buffer(name, tensor)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = MATMUL_NBITS(x, self.packed, self.scales, None, self.num_bits)
        return product + self.bias
