"""What a training of precision routers leaves in a quantized folder.

::

    precision_routers.safetensors     parameters of the routers, `routers.{layer}.{name}`
    precision_router_config.json      which precisions they choose from, how; the format's version
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from torch import nn

from modcompile.config import PrecisionRouterConfig
from modcompile.durable_files import write_json
from modcompile.errors import ArtifactError, ConfigError
from modcompile.precision_routers import PrecisionRouter
from modcompile.router_weights import load_router_weights, save_router_weights
from modcompile.versioned_json import read_versioned, versioned

FORMAT_VERSION = 1
PRECISION_ROUTERS = "precision_routers.safetensors"
PRECISION_ROUTER_CONFIG = "precision_router_config.json"
_AGAIN = "run modcompile.train again"


def has_precision_routers(folder: Path) -> bool:
    """Whether routers of precisions were trained in the folder."""
    return (folder / PRECISION_ROUTER_CONFIG).is_file()


def read_precision_router_config(folder: Path) -> tuple[PrecisionRouterConfig, list[int]]:
    """How the routers of a folder choose, and the precisions that they choose from, the lowest first.

    Raises:
        ArtifactError: it is damaged, or of another version.
    """
    path = folder / PRECISION_ROUTER_CONFIG
    stored = read_versioned(path, FORMAT_VERSION, again=_AGAIN)
    try:
        return PrecisionRouterConfig(**stored["routers"]), [int(bits) for bits in stored["precisions"]]
    except (KeyError, TypeError, ValueError, ConfigError) as error:
        raise ArtifactError(f"{path} is damaged ({error}); {_AGAIN}") from error


def save_precision_routers(
    routers: Mapping[int, nn.Module], config: PrecisionRouterConfig, precisions: Sequence[int], folder: Path
) -> None:
    """Write both files into a folder that exists."""
    save_router_weights(routers, folder / PRECISION_ROUTERS)
    content = {"precisions": list(precisions), "routers": asdict(config)}
    write_json(folder / PRECISION_ROUTER_CONFIG, versioned(FORMAT_VERSION, content))


def load_precision_routers(
    routers: Mapping[int, PrecisionRouter], folder: Path, known: Sequence[int], wanted: Sequence[int]
) -> None:
    """Fill routers that choose from the precisions `wanted`, some of the `known` ones of the folder's routers.

    Raises:
        ArtifactError: the file is missing or damaged, or holds the routers of another model.
    """
    stored = {layer: router.like(len(known)) for layer, router in routers.items()}
    load_router_weights(stored, folder / PRECISION_ROUTERS, again=_AGAIN)
    for layer, router in routers.items():
        router.take(stored[layer], [known.index(bits) for bits in wanted])
