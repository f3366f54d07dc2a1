"""Random places for the sequences of a batch, so that several processes draw what one would."""

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast


def draw_places(accelerator: Accelerator, batch_size: int) -> torch.Tensor:
    """`[B]`, in [0, 1), on the CPU; those of all processes' sequences, process by process, are evenly spaced.

    The first of all is drawn at random, in the first process: others may have drawn more or fewer numbers by now.
    """
    device = accelerator.device
    counts = accelerator.gather(torch.tensor([batch_size], device=device)).tolist()
    start = float(broadcast(torch.rand(()).to(device)))
    before, total = sum(counts[: accelerator.process_index]), sum(counts)
    places: torch.Tensor = (start + torch.arange(before, before + batch_size) / total) % 1
    return places
