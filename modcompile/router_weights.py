"""The parameters of routers and adapters in a safetensors file: `routers.{layer}.{name}`, `adapters.{layer}.{name}`."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from modcompile.errors import ArtifactError

_ABOUT = "modcompile"


def save_router_weights(
    routers: Mapping[int, nn.Module], path: Path, about: str = "", *, adapters: Mapping[int, nn.Module] | None = None
) -> None:
    """Write the parameters of routers and adapters, by their layers; `about` is kept in the file's header."""
    wanted = _state(routers, adapters)
    state = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in wanted.items()}
    # One entry: of several, the order in the file is random, and equal routers make equal files.
    save_file(state, path, metadata={_ABOUT: about} if about else {"format": "pt"})


def load_router_weights(
    routers: Mapping[int, nn.Module], path: Path, *, adapters: Mapping[int, nn.Module] | None = None, again: str
) -> None:
    """Fill routers and adapters from a file; `again` is what to run for another.

    Raises:
        ArtifactError: the file is missing or damaged, or holds the routers of another model.
    """
    try:
        stored = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{path} can't be read ({error}); {again}") from error
    wanted = {name: tensor.shape for name, tensor in _state(routers, adapters).items()}
    found = {name: tensor.shape for name, tensor in stored.items()}
    if found != wanted:
        name = min(wanted.items() ^ found.items())[0]
        raise ArtifactError(
            f"{path} holds the routers of another model: {name} is {_shape(found.get(name))}, here it is "
            f"{_shape(wanted.get(name))}; {again}"
        )
    for prefix, module in _by_prefix(routers, adapters).items():
        module.load_state_dict({name.removeprefix(prefix): stored[name] for name in stored if name.startswith(prefix)})


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


def _by_prefix(routers: Mapping[int, nn.Module], adapters: Mapping[int, nn.Module] | None) -> dict[str, nn.Module]:
    named = {f"routers.{layer}.": router for layer, router in routers.items()}
    return named | {f"adapters.{layer}.": adapter for layer, adapter in (adapters or {}).items()}


def _state(routers: Mapping[int, nn.Module], adapters: Mapping[int, nn.Module] | None) -> dict[str, torch.Tensor]:
    return {
        f"{prefix}{name}": tensor
        for prefix, module in _by_prefix(routers, adapters).items()
        for name, tensor in module.state_dict().items()
    }


def _shape(shape: torch.Size | None) -> str:
    return "missing" if shape is None else f"of shape {list(shape)}"
