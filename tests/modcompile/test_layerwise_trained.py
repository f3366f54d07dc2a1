"""Routers that were trained in a folder, and what training them keeps."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from modcompile import LayerwiseQuantizeForCausalLM
from modcompile.artifacts import save_depth_routers
from modcompile.config import RouterConfig
from modcompile.errors import ArtifactError
from modcompile.precision_config import PrecisionRouterConfig
from modcompile.precision_router_files import save_precision_routers
from tests.tiny_quantized import BITS, let_routers_decide

_DEPTH = RouterConfig(router_hidden_size=8, router_pattern="every_other", skip_adapter="low_rank", adapter_rank=4)
_IDS = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def trained(quantized_folder: Path) -> LayerwiseQuantizeForCausalLM:
    """Its routers decide; not to be changed."""
    model = LayerwiseQuantizeForCausalLM.from_quantized(quantized_folder, depth=_DEPTH, router_scope="token")
    let_routers_decide(model)
    return model


@pytest.fixture(scope="module")
def shared(
    quantized_folder: Path, trained: LayerwiseQuantizeForCausalLM, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The folder that its routers are kept in; not to be changed."""
    folder = Path(shutil.copytree(quantized_folder, tmp_path_factory.mktemp("trained") / "folder"))
    save_precision_routers(trained.routers, trained.router_config, trained.precisions, folder)
    save_depth_routers(trained.depth_routers, _DEPTH, folder, trained.adapters)
    return folder


@pytest.fixture
def folder(shared: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(shared, tmp_path / "folder"))


def _used(model: LayerwiseQuantizeForCausalLM) -> tuple[torch.Tensor, ...]:
    output = model.infer_forward(_IDS)
    assert output.logits is not None and output.num_bits is not None
    return output.logits, *output.num_bits


def _same(model: LayerwiseQuantizeForCausalLM, other: LayerwiseQuantizeForCausalLM) -> bool:
    return all(torch.equal(*both) for both in zip(_used(model), _used(other), strict=True))


def test_both_kinds_of_routers_are_read_back(shared: Path, trained: LayerwiseQuantizeForCausalLM) -> None:
    model = LayerwiseQuantizeForCausalLM.from_quantized(shared)
    assert (model.router_config, model.depth_config) == (PrecisionRouterConfig("token"), _DEPTH)
    assert model.precisions == BITS
    assert _same(model, trained)
    assert torch.stack(_used(model)[1:]).unique().tolist() == [0, *BITS]


def test_some_of_the_precisions_are_chosen_from_as_before(shared: Path, trained: LayerwiseQuantizeForCausalLM) -> None:
    model = LayerwiseQuantizeForCausalLM.from_quantized(shared, [16, 2])
    assert model.precisions == [2, 16]
    trained.set_precision_bias(torch.tensor([0, -torch.inf, 0]))
    expected = _used(trained)
    trained.set_precision_bias(None)
    torch.testing.assert_close(_used(model), expected, rtol=0, atol=1e-5)
    assert torch.stack(_used(model)[1:]).unique().tolist() == [0, 2, 16]


def test_with_options_routers_are_new_and_gates_stay(shared: Path, trained: LayerwiseQuantizeForCausalLM) -> None:
    model = LayerwiseQuantizeForCausalLM.from_quantized(shared, router_dropout=0.5)
    assert model.router_config == PrecisionRouterConfig("sequence", "soft", 0.5)
    bits = torch.stack(_used(model)[1:])
    assert bits.unique().tolist() == [0, 16]
    # What the first block reads is the same.
    assert torch.equal(bits[0] == 0, _used(trained)[1] == 0)


def test_precisions_that_routers_do_not_know_make_new_ones(folder: Path, trained: LayerwiseQuantizeForCausalLM) -> None:
    of_two = {layer: router.like(2) for layer, router in trained.routers.items()}
    save_precision_routers(of_two, trained.router_config, [2, 4], folder)
    model = LayerwiseQuantizeForCausalLM.from_quantized(folder, [2, 16])
    assert model.router_config == PrecisionRouterConfig("token")
    assert torch.stack(_used(model)[1:]).unique().tolist() == [0, 16]


def test_other_gates_are_new(shared: Path, trained: LayerwiseQuantizeForCausalLM) -> None:
    model = LayerwiseQuantizeForCausalLM.from_quantized(shared, depth=RouterConfig(router_start=1))
    assert tuple(model.depth_routers) == (1, 2)
    bits, before = torch.stack(_used(model)[1:]), _used(trained)[1]
    assert 0 not in bits
    # The routers of precisions are those that were trained.
    assert torch.equal(bits[0][before > 0], before[before > 0])


@pytest.mark.parametrize("name", ["precision_routers.safetensors", "routers.safetensors"])
def test_names_routers_that_are_damaged(folder: Path, name: str) -> None:
    (folder / name).write_bytes((folder / name).read_bytes()[:-20])
    with pytest.raises(ArtifactError, match=f"{name} can't be read"):
        LayerwiseQuantizeForCausalLM.from_quantized(folder)


@pytest.fixture
def checkpointed(trained: LayerwiseQuantizeForCausalLM) -> Iterator[LayerwiseQuantizeForCausalLM]:
    """To switch gradient checkpointing on and off."""
    yield trained
    trained.gradient_checkpointing_disable()
    trained.zero_grad()


def _gradients(model: LayerwiseQuantizeForCausalLM) -> list[torch.Tensor]:
    model.zero_grad()
    loss = model.train_forward(_IDS, labels=_IDS).loss
    assert loss is not None
    loss.backward()
    return [parameter.grad.clone() for parameter in model.get_trainable_parameters() if parameter.grad is not None]


def _kept(model: LayerwiseQuantizeForCausalLM) -> int:
    """Numbers that a forward pass keeps for the backward pass, parameters included."""
    sizes: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.train_forward(_IDS, labels=_IDS)
    return sum(sizes)


def test_gradient_checkpointing_keeps_less_and_gives_the_same(checkpointed: LayerwiseQuantizeForCausalLM) -> None:
    gradients, plain = _gradients(checkpointed), _kept(checkpointed)
    assert len(gradients) == len(checkpointed.get_trainable_parameters())
    checkpointed.gradient_checkpointing_enable()
    assert _kept(checkpointed) < plain / 2
    torch.testing.assert_close(_gradients(checkpointed), gradients, rtol=0, atol=0)
    checkpointed.gradient_checkpointing_disable()
    assert _kept(checkpointed) == plain
