"""What modules of a graph return while it runs."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def module_outputs(modules: Mapping[int, nn.Module]) -> Iterator[dict[int, list[torch.Tensor]]]:
    """Give what each of the modules returns inside the block, call by call, under the key of the module."""
    found: dict[int, list[torch.Tensor]] = {key: [] for key in modules}
    handles = [
        module.register_forward_hook(lambda _, __, output, key=key: found[key].append(output))
        for key, module in modules.items()
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
