"""What each block chose for each token, in an evaluation of routers that are trained."""

from collections.abc import Sequence
from typing import Any

import torch

_OPEN = 0.5  # of a gate that is soft; where `infer_forward` has its threshold


def chosen_bits(output: Any, precisions: Sequence[int]) -> list[torch.Tensor]:
    """The bits of every block, int64 `[B, T]`, 0 where its gate is closed.

    `output` is that of `train_forward(hard=True)` for a model of these precisions.
    """
    by_index = torch.tensor(precisions, device=output.tokens.device)
    chosen = [by_index[weights.argmax(-1)].expand_as(output.tokens) for weights in output.precision_weights]
    for layer, gate in output.gates.items():
        chosen[layer] = chosen[layer] * (gate.squeeze(-1) > _OPEN)
    return chosen
