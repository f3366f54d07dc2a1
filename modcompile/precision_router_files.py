"""`precision_routers.safetensors`: what a training of precision routers leaves in a quantized folder.

It holds the parameters of the routers, `routers.{layer}.{name}`, and in its header, as JSON, which precisions they
choose from, how, and the format's version. One file: routers and what they are for are replaced in one step.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from modcompile.durable_files import replace_file
from modcompile.errors import ArtifactError, ConfigError
from modcompile.precision_config import PrecisionRouterConfig
from modcompile.precision_routers import PrecisionRouter
from modcompile.router_weights import load_router_weights, read_about, save_router_weights
from modcompile.versioned_json import parse_versioned, versioned

FORMAT_VERSION = 1
PRECISION_ROUTERS = "precision_routers.safetensors"
_AGAIN = "remove it and run modcompile.train again"


def has_precision_routers(folder: Path) -> bool:
    """Whether routers of precisions were trained in the folder."""
    return (folder / PRECISION_ROUTERS).is_file()


def read_precision_router_config(folder: Path) -> tuple[PrecisionRouterConfig, list[int]]:
    """How the routers of a folder choose, and the precisions that they choose from, the lowest first.

    Raises:
        ArtifactError: the file is damaged, or of another version.
    """
    path = folder / PRECISION_ROUTERS
    stored = parse_versioned(read_about(path, again=_AGAIN), path, FORMAT_VERSION, again=_AGAIN)
    try:
        return PrecisionRouterConfig(**stored["routers"]), [int(bits) for bits in stored["precisions"]]
    except (KeyError, TypeError, ValueError, ConfigError) as error:
        raise ArtifactError(f"{path} is damaged ({error}); {_AGAIN}") from error


def save_precision_routers(
    routers: Mapping[int, PrecisionRouter], config: PrecisionRouterConfig, precisions: Sequence[int], folder: Path
) -> None:
    """Write or replace the file, in one step."""
    about = json.dumps(versioned(FORMAT_VERSION, {"precisions": list(precisions), "routers": asdict(config)}))
    replace_file(folder / PRECISION_ROUTERS, lambda staging: save_router_weights(routers, staging, about))


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
