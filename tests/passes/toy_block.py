"""A block with a key: small enough to see what is left of it."""

import torch
from torch import fx

from tests.passes.traced import BATCH, PAST, TOKENS, Run, random, traced

HIDDEN, PAST_KEY = random(BATCH, TOKENS, 8), random(BATCH, 1, PAST, 8, seed=1)


def toy_block() -> fx.GraphModule:
    """`hidden [B, T, 8]`, `past_key [B, 1, P, 8]` → twice the hidden state plus the mean key, and all keys."""

    def block(self: Run, hidden: torch.Tensor, past_key: torch.Tensor) -> tuple[torch.Tensor, ...]:
        key = torch.cat([past_key, (hidden * self.weight).unsqueeze(1)], 2)
        return hidden * 2 + key.mean(2), key

    return traced(Run(block, weight=random(8, seed=2)), HIDDEN, PAST_KEY)
