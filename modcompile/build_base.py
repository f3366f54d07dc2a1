"""Build a base model from tensors that come otherwise than in the checkpoint of a plain model."""

from pathlib import Path
from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel

from modcompile.checkpoint_config import load_config, load_error
from modcompile.checkpoint_sources import CheckpointSource
from modcompile.checkpoints import load_problems
from modcompile.errors import CheckpointError
from modcompile.progress import quiet_transformers


def build_base(folder: Path, state: dict[str, torch.Tensor], dtype: torch.dtype) -> PreTrainedModel:
    """The model of a folder's config.json with the parameters of `state`, in evaluation mode, frozen.

    Raises:
        CheckpointError: config.json is missing or damaged, or `state` lacks a parameter, or has it in another shape.
        UnsupportedModelError: it is that of no causal language model.
    """
    source = CheckpointSource("folder", str(folder))
    config = load_config(source, folder)
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    try:
        with quiet_transformers():
            loaded: tuple[PreTrainedModel, dict[str, Any]] = model_class.from_pretrained(
                None,
                config=config,
                state_dict=state,
                dtype=dtype,
                ignore_mismatched_sizes=True,  # to name them here
                output_loading_info=True,
            )
    except Exception as error:
        raise load_error(source, error) from error
    model, info = loaded
    problems = load_problems(info)
    for name in problems["mismatched_keys"]:
        raise CheckpointError(
            f"{source}: the shape of {name} does not fit its config; use the two that belong together"
        )
    for name in problems["missing_keys"]:
        raise CheckpointError(f"{source} has no weights for {name}; complete the checkpoint")
    model.eval().requires_grad_(False)
    return model
