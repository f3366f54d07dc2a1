"""Load a checkpoint's configuration, and tell what can't be routed from it."""

from pathlib import Path
from textwrap import shorten

import transformers
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PretrainedConfig

from modcompile.checkpoint_files import CONFIG, check_gguf, read_config
from modcompile.checkpoint_sources import CheckpointSource
from modcompile.errors import CheckpointError, UnsupportedModelError


def load_config(source: CheckpointSource, folder: Path) -> PretrainedConfig:
    """The configuration in a checkpoint's config.json, or in its GGUF file, in `folder`.

    Raises:
        CheckpointError: it is missing or damaged, or of a model_type that transformers does not know.
        UnsupportedModelError: it is that of an encoder-decoder, of no language model, or of quantized safetensors.
    """
    if source.gguf_file is None:
        stored = read_config(folder)
        if stored["model_type"] not in CONFIG_MAPPING:
            raise CheckpointError(
                f"{folder / CONFIG}: transformers {transformers.__version__} knows no model_type "
                f'"{stored["model_type"]}", and code that comes with a checkpoint is not run'
            )
        if stored.get("quantization_config"):
            raise UnsupportedModelError(
                f"{source} is quantized (quantization_config in {CONFIG}); give the checkpoint that it was made from"
            )
    else:
        check_gguf(folder / source.gguf_file)
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False, **source.gguf_argument)
    except Exception as error:
        raise load_error(source, error) from error
    if config.is_encoder_decoder:
        raise UnsupportedModelError(
            f"{source} is an encoder-decoder ({config.model_type}); modcompile routes causal decoders"
        )
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnsupportedModelError(
            f"{source} is no causal language model ({config.model_type} has none in transformers)"
        )
    return config


def load_error(source: CheckpointSource, error: Exception) -> CheckpointError:
    """What to say when transformers fails to load a checkpoint for a reason of its own."""
    if source.gguf_file is None:
        return CheckpointError(
            f"{source} can't be loaded by transformers {transformers.__version__} ({summary(error)})"
        )
    return CheckpointError(
        f"{source} can't be read ({summary(error)}): it is damaged, cut short, or of an architecture that "
        f"transformers {transformers.__version__} does not read from GGUF files"
    )


def summary(error: Exception) -> str:
    """An error's message in one line of bounded length, or the name of an error without a message."""
    return shorten(str(error), 240, placeholder=" …") or type(error).__name__
