"""Other routed folders of the same base, measured on the same text: what routers are compared with."""

from collections.abc import Sequence
from pathlib import Path

import torch
from datasets import Dataset

from modcompile.artifacts import load_with_routers
from modcompile.errors import ConfigError
from modcompile.modeling import RoutedForCausalLM
from modcompile.perplexity import Measurement, measure
from modcompile.progress import show_elapsed

_THRESHOLD = 0.5


def measure_beside(
    folders: Sequence[str], model: RoutedForCausalLM, blocks: Dataset, *, batch_size: int = 4
) -> dict[str, Measurement]:
    """Each folder, hard at a threshold of 0.5, on `blocks` as `tokenize_and_pack` makes them; by what it is called.

    Raises:
        ArtifactError: a folder is missing, incomplete, damaged, or of another version.
        CheckpointError: its base can't be read.
        ConfigError: its base is another than that of `model`.
        DataError: there is no token to predict, or one that the model does not have.
    """
    measured = {}
    for name in folders:
        with show_elapsed(f"measuring {name}"):
            other = load_with_routers(Path(name), _THRESHOLD, device=model.device, use_cache=False)
            if not _have_one_base(model, other):
                raise ConfigError(f"--beside {name} is a folder of another model; name folders of the same base")
            measured[name] = measure(other, blocks, _THRESHOLD, batch_size=batch_size)
    return measured


def _have_one_base(model: RoutedForCausalLM, other: RoutedForCausalLM) -> bool:
    one, two = (dict(each.base.named_parameters()) for each in (model, other))
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
