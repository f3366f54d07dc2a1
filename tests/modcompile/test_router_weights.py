from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from modcompile.errors import ArtifactError
from modcompile.router_weights import load_router_weights, read_about, save_router_weights


def _routers(seed: int = 0, *, layers: tuple[int, ...] = (1, 10), size: int = 3) -> dict[int, nn.Module]:
    """Those of layer 1 and layer 10: one number is the beginning of the other."""
    torch.manual_seed(seed)
    return {layer: nn.Sequential(nn.Linear(4, size), nn.ReLU(), nn.Linear(size, 2)) for layer in layers}


def _state(routers: dict[int, nn.Module]) -> dict[int, dict[str, torch.Tensor]]:
    return {layer: dict(router.state_dict()) for layer, router in routers.items()}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "routers.safetensors"
    save_router_weights(_routers(), path, "what they are for")
    return path


def test_reads_what_was_written(path: Path) -> None:
    routers = _routers(seed=1)
    load_router_weights(routers, path, again="train again")
    torch.testing.assert_close(_state(routers), _state(_routers()), rtol=0, atol=0)
    assert read_about(path, again="train again") == "what they are for"
    assert sorted(load_file(path))[:2] == ["routers.1.0.bias", "routers.1.0.weight"]


def test_adapters_are_kept_beside_the_routers(path: Path) -> None:
    adapters = _routers(seed=2)
    save_router_weights(_routers(), path, adapters=adapters)
    routers, read = _routers(seed=1), _routers(seed=1)
    load_router_weights(routers, path, adapters=read, again="train again")
    torch.testing.assert_close(_state(routers), _state(_routers()), rtol=0, atol=0)
    torch.testing.assert_close(_state(read), _state(adapters), rtol=0, atol=0)
    assert sorted(load_file(path))[:2] == ["adapters.1.0.bias", "adapters.1.0.weight"]
    with pytest.raises(ArtifactError, match=r"adapters\.1\.0\.bias is of shape \[3\], here it is missing"):
        load_router_weights(routers, path, again="train again")


def test_equal_routers_make_equal_files(path: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    for about in ("what they are for", ""):
        save_router_weights(_routers(), path, about)
        save_router_weights(_routers(), other, about)
        assert other.read_bytes() == path.read_bytes()


def test_nothing_is_kept_unless_told(path: Path) -> None:
    save_router_weights(_routers(), path)
    assert read_about(path, again="train again") == "None"


def test_what_is_written_does_not_change_with_the_routers(path: Path) -> None:
    routers = _routers()
    before = load_file(path)
    for router in routers.values():
        for parameter in router.parameters():
            nn.init.zeros_(parameter)
    torch.testing.assert_close(load_file(path), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("routers", "says"),
    [
        (_routers(layers=(1, 2)), r"routers\.10\.0\.bias is of shape \[3\], here it is missing"),
        (_routers(layers=(1, 10, 11)), r"routers\.11\.0\.bias is missing, here it is of shape \[3\]"),
        (_routers(size=5), r"routers\.1\.0\.bias is of shape \[3\], here it is of shape \[5\]"),
    ],
)
def test_names_what_differs_in_another_model(path: Path, routers: dict[int, nn.Module], says: str) -> None:
    before = {layer: {name: t.clone() for name, t in state.items()} for layer, state in _state(routers).items()}
    with pytest.raises(ArtifactError, match=rf"holds the routers of another model: {says}; train again"):
        load_router_weights(routers, path, again="train again")
    torch.testing.assert_close(_state(routers), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    "damage",
    [
        Path.unlink,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-4]),
        lambda path: path.write_bytes(path.read_bytes()[:40]),
    ],
)
def test_names_a_file_that_is_missing_or_cut_short(path: Path, damage: Callable[[Path], object]) -> None:
    damage(path)
    with pytest.raises(ArtifactError, match=r"routers\.safetensors can't be read \(.*\); train again"):
        load_router_weights(_routers(), path, again="train again")
    with pytest.raises(ArtifactError, match=r"routers\.safetensors can't be read \(.*\); train again"):
        read_about(path, again="train again")


def test_a_file_without_a_header_of_ours_says_nothing(path: Path) -> None:
    save_file(load_file(path), path)
    assert read_about(path, again="train again") == "None"
