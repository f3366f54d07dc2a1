"""What a training of routers has to know of a model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from modcompile.objective import Objective


@dataclass(frozen=True)
class RouterTask:
    """A model whose routers are trained, what for, and how they are kept."""

    model: PreTrainedModel
    """Called with `input_ids`, `attention_mask` and `labels`, all `[B, T]`, in training mode."""
    evaluated: Callable[..., Any]
    """What is called instead for an evaluation."""
    objective: Objective
    save: Callable[[Path], None]
    """Writes the routers into a folder that exists, a checkpoint say."""
    load: Callable[[Path], None]
    """Fills the routers from such a folder."""
    description: str
    """One line: what is trained, and how small it is."""
    depth_routers: Sequence[torch.nn.Parameter] = ()
    """The parameters of depth routers, which may learn at another rate than the adapters beside them."""
    dense_logits: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    """From `input_ids` and `attention_mask`, `[B, T]`, to the dense model's logits `[B, T, V]`; an objective that
    distills needs it."""
    chosen_bits: Callable[[Any], Sequence[torch.Tensor]] | None = None
    """From an output of `evaluated` to the bits of every block, int64 `[B, T]`; None where they have no choice."""
    set_progress: Callable[[float], None] | None = None
    """Told, before every batch that is trained on, which share of the training is over; for what changes with it."""
    set_prices: Callable[[torch.Tensor], torch.Tensor] | None = None
    """Told, before every batch that is trained on, a place in [0, 1) for each sequence, `[B]`, gives the factors
    on the price of what they execute, `[B]`; None where all have the same."""
    gate_correction: Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    """What is added to the losses that are summed over tokens, for its gradient: of an output, the tokens `[B, T]` that
    predict, and what each sequence counts, `[B]` (`GateCurvature`)."""
    finish: tuple[Callable[[], None], ...] = ()
    """Called when the training is over, before anything is saved or evaluated."""
