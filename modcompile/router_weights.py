"""The parameters of routers in a safetensors file, `routers.{layer}.{name}`."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from modcompile.errors import ArtifactError

_ABOUT = "modcompile"


def save_router_weights(routers: Mapping[int, nn.Module], path: Path, about: str = "") -> None:
    """Write the parameters of the routers, by their layers; `about` is kept in the file's header."""
    state = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in _state(routers).items()}
    # One entry: of several, the order in the file is random, and equal routers make equal files.
    save_file(state, path, metadata={_ABOUT: about} if about else {"format": "pt"})


def load_router_weights(routers: Mapping[int, nn.Module], path: Path, *, again: str) -> None:
    """Fill the routers from a file; `again` is what to run for another.

    Raises:
        ArtifactError: the file is missing or damaged, or holds the routers of another model.
    """
    try:
        stored = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{path} can't be read ({error}); {again}") from error
    wanted = {name: tensor.shape for name, tensor in _state(routers).items()}
    found = {name: tensor.shape for name, tensor in stored.items()}
    if found != wanted:
        name = min(wanted.items() ^ found.items())[0]
        raise ArtifactError(
            f"{path} holds the routers of another model: {name} is {_shape(found.get(name))}, here it is "
            f"{_shape(wanted.get(name))}; {again}"
        )
    for layer, router in routers.items():
        prefix = f"routers.{layer}."
        router.load_state_dict({name.removeprefix(prefix): stored[name] for name in stored if name.startswith(prefix)})


def read_about(path: Path, *, again: str) -> str:
    """What `save_router_weights` was told to keep.

    Raises:
        ArtifactError: the file can't be read; `again` is what to run for another.
    """
    try:
        with safe_open(path, "pt") as file:
            return str((file.metadata() or {}).get(_ABOUT))
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{path} can't be read ({error}); {again}") from error


def _state(routers: Mapping[int, nn.Module]) -> dict[str, torch.Tensor]:
    return {
        f"routers.{layer}.{name}": tensor
        for layer, router in routers.items()
        for name, tensor in router.state_dict().items()
    }


def _shape(shape: torch.Size | None) -> str:
    return "missing" if shape is None else f"of shape {list(shape)}"
