"""How a block of several versions decides which of them runs.

A router gives `router_logits`, `[B, 1, P]` for sequences or `[B, T, P]` for tokens; a bias `[P]`, which a session may
override, is added. Where the block also has a depth gate, `score(hidden) > least_score` opens it, as in `harden_gates`,
and what is closed has 0 bits: skipping is the cheapest choice.
"""

from collections.abc import Sequence

import torch
from torch import nn

from modcompile.passes.token_mask import token_mask_of


class PrecisionInputs(nn.Module):
    """What the decisions of all layers share.

    `token_mask [B, T, 1]` (bool, no padding), `token_weights [B, T, 1]` that make a sum the mean of a row's tokens,
    `has_tokens [B, 1]` (0 or 1), and the bias `[P]` of each layer.
    """

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, precision_bias: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        token_mask = token_mask_of(input_ids, attention_mask)
        has_tokens = token_mask.any(1).long()
        return token_mask, token_weights_of(token_mask), has_tokens, *torch.unbind(precision_bias)


def token_weights_of(token_mask: torch.Tensor) -> torch.Tensor:
    """What makes a sum over a row the mean of its tokens, float32 `[B, T, 1]`; zeros for a row of padding."""
    return token_mask.float() / token_mask.sum(1, keepdim=True).clamp(min=1)


class _Decision(nn.Module):
    num_bits: torch.Tensor

    def __init__(self, router: nn.Module, num_bits: Sequence[int], score: nn.Module | None = None) -> None:
        super().__init__()
        self.router, self.score = router, score
        self.register_buffer("num_bits", torch.tensor(list(num_bits)), persistent=False)


class DecideForSequences(_Decision):
    """One version for a call: the highest precision that any row asks for.

    Returns a boolean `[]` for each version, then the bits that each token is computed with, int64 `[B, T]`; with a
    `score`, version 0 is to skip, for calls in which no token is open, and `is_open [B, T, 1]` comes last.
    """

    def forward(
        self,
        hidden: torch.Tensor,
        token_mask: torch.Tensor,
        token_weights: torch.Tensor,
        has_tokens: torch.Tensor,
        bias: torch.Tensor,
        least_score: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        choice = (self.router(hidden, token_weights) + bias).argmax(-1)
        # A row of nothing but padding asks for nothing.
        choice = (choice * has_tokens).max()
        chosen = [choice == index for index in range(len(self.num_bits))]
        bits = self.num_bits[choice.view(1)].expand(hidden.shape[0], hidden.shape[1])
        if self.score is None:
            return *chosen, bits.clone()
        is_open = self.score(hidden) > least_score
        needed = is_open.any()
        chosen = [needed.logical_not(), *(needed & is_chosen for is_chosen in chosen)]
        return *chosen, bits * (is_open & token_mask).squeeze(-1), is_open


class DecideForTokens(_Decision):
    """A version for every token, and one more, that mixes them, for calls whose tokens differ.

    Returns a boolean `[]` for each version and for the mixed one, the bits of each token, int64 `[B, T]`, and the
    version of each token, int64 `[B, T, 1]`; with a `score`, version 0 is to skip.
    """

    def __init__(self, router: nn.Module, precisions: Sequence[int], score: nn.Module | None = None) -> None:
        super().__init__(router, precisions if score is None else [0, *precisions], score)

    def forward(
        self,
        hidden: torch.Tensor,
        token_mask: torch.Tensor,
        token_weights: torch.Tensor,
        has_tokens: torch.Tensor,
        bias: torch.Tensor,
        least_score: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        version = (self.router(hidden, token_weights) + bias).argmax(-1, keepdim=True)
        if self.score is not None:
            version = torch.where(self.score(hidden) > least_score, version + 1, 0)
        mixed = len(self.num_bits)
        lowest = torch.where(token_mask, version, mixed).min()
        highest = torch.where(token_mask, version, -1).max()
        of_call = torch.where(lowest == highest, lowest, mixed)
        chosen = [of_call == index for index in range(mixed + 1)]
        return *chosen, self.num_bits[version.squeeze(-1)], version
