"""Where commands run a model in PyTorch."""

import torch


def fastest_device() -> str:
    """`cuda` where there is a GPU, else `cpu`."""
    return "cuda" if torch.cuda.is_available() else "cpu"
