"""Stacks of modules with the inputs of a causal LM, to vary what a decoder is not."""

import torch
from torch import fx, nn

from modcompile.passes import drop_guards

SIZE = 8


class Stack(nn.Module):
    """Embedding → blocks → head, with the inputs of a causal LM and no cache."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, SIZE)
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(SIZE, 16)

    def run_blocks(self, hidden: torch.Tensor, _mask: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            hidden = block(hidden)
        return hidden

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        mask = attention_mask.unsqueeze(-1).to(torch.float32)
        hidden = self.embed(input_ids) * mask + position_ids.unsqueeze(-1)
        return self.head(self.run_blocks(hidden, mask)), []


def trace(stack: nn.Module) -> fx.GraphModule:
    """Its flat graph, as `drop_guards` leaves it."""
    args = tuple(torch.ones(2, 3, dtype=torch.long) for _ in range(3))
    free = torch.export.Dim.AUTO
    with torch.no_grad():
        ep = torch.export.export(stack, args, dynamic_shapes=({0: free, 1: free},) * 3, strict=False)
    module = ep.module()
    assert isinstance(module, fx.GraphModule)
    return drop_guards(module)
