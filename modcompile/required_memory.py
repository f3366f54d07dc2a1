"""Refuse what the memory at hand is too small for, before the operating system ends the process without a word."""

import psutil
import torch

from modcompile.errors import ConfigError


def require_memory(numbers: int, device: torch.device, option: str, instead: str) -> None:
    """Check that a device has free memory for so many float32 numbers.

    Raises:
        ConfigError: it does not; `option` asks for too much, and `instead` is what to give.
    """
    needed = numbers * torch.float32.itemsize
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    if needed > free:
        raise ConfigError(
            f"{option} needs {needed / 1e9:,.1f} GB of memory, and {free / 1e9:,.1f} GB are free on {device}; "
            f"give {instead}"
        )
