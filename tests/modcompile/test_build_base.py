from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from modcompile.build_base import build_base
from modcompile.errors import CheckpointError
from tests.model_inputs import make_inputs, run_model


@pytest.fixture
def config_folder(model: PreTrainedModel, tmp_path: Path) -> Path:
    model.config.save_pretrained(tmp_path)
    return tmp_path


def _state(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Each parameter once, as safetensors files have them."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_builds_the_model(model: PreTrainedModel, config_folder: Path) -> None:
    built = build_base(config_folder, _state(model), torch.float32)
    inputs = make_inputs(model, 2, 5, 0, "none", 0)
    for output, expected in zip(run_model(built, inputs), run_model(model, inputs), strict=True):
        assert torch.equal(output, expected)
    assert not built.training
    assert not any(parameter.requires_grad for parameter in built.parameters())


def test_has_the_dtype_asked_for(llama: PreTrainedModel, tmp_path: Path) -> None:
    llama.config.save_pretrained(tmp_path)
    half = {name: tensor.half() for name, tensor in _state(llama).items()}
    built = build_base(tmp_path, half, torch.float32)
    torch.testing.assert_close(
        dict(built.named_parameters()), {name: half[name].float() for name in half}, rtol=0, atol=0
    )


def test_names_the_parameter_that_is_missing_or_of_another_shape(model: PreTrainedModel, config_folder: Path) -> None:
    # Of a block: some heads are the embeddings, and may be missing.
    name = next(name for name, parameter in model.named_parameters() if ".0." in name and parameter.dim() == 2)
    missing = {key: tensor for key, tensor in _state(model).items() if key != name}
    with pytest.raises(CheckpointError, match=f"has no weights for {name}; complete"):
        build_base(config_folder, missing, torch.float32)
    with pytest.raises(CheckpointError, match=f"the shape of {name} does not fit its config"):
        build_base(config_folder, missing | {name: torch.zeros(3, 5)}, torch.float32)


def test_needs_a_config(model: PreTrainedModel, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        build_base(tmp_path, _state(model), torch.float32)
