import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from modcompile.errors import ArtifactError
from modcompile.precision_config import PrecisionRouterConfig
from modcompile.precision_router_files import (
    PRECISION_ROUTERS,
    has_precision_routers,
    load_precision_routers,
    read_precision_router_config,
    save_precision_routers,
)
from modcompile.precision_routers import PrecisionRouter

_BITS = [2, 4, 16]
_CONFIG = PrecisionRouterConfig("token", "sampled", 0.25)
_HIDDEN = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
_TOKENS = torch.full((2, 5, 1), 0.2)


def _routers(seed: int, num_precisions: int = len(_BITS), hidden_size: int = 8) -> dict[int, PrecisionRouter]:
    torch.manual_seed(seed)
    routers = {layer: PrecisionRouter(hidden_size, num_precisions, dropout=0.25, for_tokens=True) for layer in range(2)}
    for router in routers.values():
        nn.init.normal_(router.last.weight)
        nn.init.normal_(router.last.bias)
        router.eval()
    return routers


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_precision_routers(_routers(0), _CONFIG, _BITS, tmp_path)
    return tmp_path


def test_a_folder_without_them_says_so(tmp_path: Path) -> None:
    assert not has_precision_routers(tmp_path)


def test_reads_what_was_written(folder: Path) -> None:
    assert has_precision_routers(folder)
    assert [path.name for path in folder.iterdir()] == [PRECISION_ROUTERS]
    assert read_precision_router_config(folder) == (_CONFIG, _BITS)
    routers, expected = _routers(1), _routers(0)
    load_precision_routers(routers, folder, _BITS, _BITS)
    for layer, router in routers.items():
        torch.testing.assert_close(router.state_dict(), expected[layer].state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("wanted", [[2, 16], [4], [16]])
def test_some_of_the_precisions_keep_their_logits(folder: Path, wanted: list[int]) -> None:
    routers = _routers(1, len(wanted))
    load_precision_routers(routers, folder, _BITS, wanted)
    places = [_BITS.index(bits) for bits in wanted]
    for layer, router in routers.items():
        expected = _routers(0)[layer](_HIDDEN, _TOKENS)[..., places]
        torch.testing.assert_close(router(_HIDDEN, _TOKENS), expected)


def test_equal_routers_make_equal_files(folder: Path) -> None:
    first = (folder / PRECISION_ROUTERS).read_bytes()
    save_precision_routers(_routers(1), _CONFIG, _BITS, folder)
    assert (folder / PRECISION_ROUTERS).read_bytes() != first
    save_precision_routers(_routers(0), _CONFIG, _BITS, folder)
    assert (folder / PRECISION_ROUTERS).read_bytes() == first
    assert [path.name for path in folder.iterdir()] == [PRECISION_ROUTERS]


@pytest.mark.parametrize("routers", [_routers(1, hidden_size=9), _routers(1) | {2: _routers(1)[0]}])
def test_names_the_routers_of_another_model(folder: Path, routers: dict[int, PrecisionRouter]) -> None:
    with pytest.raises(ArtifactError, match="holds the routers of another model: routers"):
        load_precision_routers(routers, folder, _BITS, _BITS)


def _about(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Change what the header tells of the routers."""

    def damage(path: Path) -> None:
        with safe_open(path, "pt") as file:
            stored = json.loads(file.metadata()["modcompile"])
        change(stored)
        save_file(load_file(path), path, metadata={"modcompile": json.dumps(stored)})

    return damage


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (Path.unlink, "can't be read"),
        (lambda path: path.write_bytes(path.read_bytes()[:100]), "can't be read"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "can't be read"),
        (lambda path: save_file(load_file(path), path), "is damaged"),
        (lambda path: save_file(load_file(path), path, metadata={"modcompile": "{"}), "is damaged"),
        (_about(lambda stored: stored.update(format_version=2)), "has format 2, this modcompile .* reads format 1"),
        (_about(lambda stored: stored.pop("routers")), r"is damaged \('routers'\)"),
        (_about(lambda stored: stored.pop("precisions")), r"is damaged \('precisions'\)"),
        (_about(lambda stored: stored.update(precisions=None)), "is damaged"),
        (_about(lambda stored: stored.update(precisions=["many"])), "is damaged"),
        (_about(lambda stored: stored["routers"].update(width=3)), "is damaged .*width"),
        (_about(lambda stored: stored["routers"].update(router_scope="word")), "is damaged .*--router_scope is 'word'"),
        (_about(lambda stored: stored["routers"].update(router_dropout=2)), "is damaged .*--router_dropout is 2"),
        (_about(lambda stored: stored["routers"].update(router_dropout="half")), "is damaged"),
    ],
)
def test_says_what_is_wrong_with_a_file(folder: Path, damage: Callable[[Path], object], says: str) -> None:
    damage(folder / PRECISION_ROUTERS)
    with pytest.raises(ArtifactError, match=f"{PRECISION_ROUTERS} {says}.*; remove it and run modcompile.train again"):
        read_precision_router_config(folder)
