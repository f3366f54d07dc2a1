"""Load a base model for rewriting, and save it where plain transformers finds it again."""

import json
import logging
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from modcompile.causality import check_is_causal
from modcompile.checkpoint_config import load_config, load_error, summary
from modcompile.checkpoint_files import check_gguf, check_weights
from modcompile.checkpoint_sources import CheckpointSource, fetch_checkpoint
from modcompile.durable_files import write_json
from modcompile.errors import CheckpointError
from modcompile.progress import quiet_transformers, show_elapsed
from modcompile.stages import stage

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer_config.json",
)
_FLOATING = ("F64", "F32", "F16", "BF16")
_ONE_FILE = "1000TB"

_logger = logging.getLogger(__name__)


@stage("loading weights")
def load_base(source: CheckpointSource) -> PreTrainedModel:
    """The model in evaluation mode, frozen, on the CPU, in the dtype it is stored in (a GGUF file is dequantized).

    Code that comes with a checkpoint is never run, nor are pickles read.

    Raises:
        CheckpointError: files are missing or damaged, or do not fit together, or hold NaN or infinite weights.
        UnsupportedModelError: the checkpoint is sound, but no causal decoder, or quantized other than as GGUF.
    """
    folder = fetch_checkpoint(source)
    with show_elapsed(f"loading {source.name}"), quiet_transformers():
        config = load_config(source, folder)
        dtypes = check_weights(folder) if source.gguf_file is None else {}
        model, problems = _load_model(source, folder, config)
        for name in problems["mismatched_keys"]:
            raise CheckpointError(
                f"{source}: the shape of {name} does not fit its config; use the two that belong together"
            )
        for name, parameter in model.named_parameters():
            if dtypes.get(name, "F32") not in _FLOATING:
                raise CheckpointError(f"{source}: {name} is stored as {dtypes[name]}, which is no floating-point type")
            if not _is_finite(parameter):
                raise CheckpointError(f"{source}: {name} holds NaN or infinite weights; get the checkpoint again")
        # Before missing weights are looked at: an encoder's checkpoint lacks the head that only a decoder has.
        check_is_causal(model)
        for name in problems["missing_keys"]:
            raise CheckpointError(f"{source} has no weights for {name}; complete the checkpoint")
    unused = problems["unexpected_keys"]
    if unused:
        _logger.warning(
            "%s holds %d tensors that its model does not use, %s among them", source, len(unused), unused[0]
        )
    return model


@stage("loading the tokenizer")
def load_tokenizer(source: CheckpointSource) -> PreTrainedTokenizerBase | None:
    """The tokenizer that comes with the model, or None if none does.

    Raises:
        CheckpointError: its files are damaged.
    """
    folder = fetch_checkpoint(source)
    if not _has_tokenizer(folder, source.gguf_file):
        return None
    with show_elapsed(f"loading the tokenizer of {source.name}"), quiet_transformers():
        try:
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                folder, trust_remote_code=False, **source.gguf_argument
            )
        except Exception as error:  # Parsers of four formats, each with errors of its own.
            raise CheckpointError(f"the tokenizer of {source} can't be loaded ({summary(error)})") from error
    return tokenizer


def load_problems(info: Mapping[str, Any]) -> dict[str, list[str]]:
    """What does not fit, by its kind (`mismatched_keys`, …), of the loading info of `from_pretrained`."""
    # Of what has another shape, transformers 4.57 lists names, 5.x names with two shapes.
    return {
        kind: sorted(entry if isinstance(entry, str) else entry[0] for entry in info[kind])
        for kind in ("mismatched_keys", "missing_keys", "unexpected_keys")
    }


def save_base(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path) -> None:
    """Write config.json, generation_config.json, model.safetensors and the tokenizer's files into `folder`.

    `AutoModelForCausalLM.from_pretrained(folder)` loads the same model, bit for bit.
    """
    generation_config = model.generation_config
    with show_elapsed(f"writing {folder.name}"), quiet_transformers():
        # In transformers 4.57, save_pretrained refuses a generation config that sets, say, a temperature and no
        # sampling. Checkpoints come with such files and load, so it is written here, as it is.
        model.generation_config = GenerationConfig() if generation_config is not None else None
        try:
            model.save_pretrained(folder, max_shard_size=_ONE_FILE)
        finally:
            model.generation_config = generation_config
        if generation_config is not None:
            generation_config.to_json_file(folder / "generation_config.json")
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
            _describe_tokenizer_to_all_versions(tokenizer, folder / "tokenizer_config.json")


def _describe_tokenizer_to_all_versions(tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Put down the general tokenizer class by the name that transformers 4 (so optimum) knows, too.

    The class of that name there makes token type ids unless told otherwise, which `generate` refuses.
    """
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if config.get("tokenizer_class") in ("TokenizersBackend", "PreTrainedTokenizerFast"):
        names = {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": tokenizer.model_input_names}
        write_json(path, {**config, **names})


def _is_finite(parameter: torch.Tensor) -> bool:
    """Whether no number in it is infinite or NaN, found without a mask as large as the parameter."""
    return parameter.numel() == 0 or all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(parameter))


def _load_model(
    source: CheckpointSource, folder: Path, config: PretrainedConfig
) -> tuple[PreTrainedModel, dict[str, list[str]]]:
    """The model, and the names of weights whose shapes do not fit, that do not exist, and that are not used."""
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype="auto",
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # to name them here
            output_loading_info=True,
            **source.gguf_argument,
        )
    except Exception as error:  # The library checks little: a bad value surfaces wherever it is first used.
        raise load_error(source, error) from error
    model, info = loaded
    if source.gguf_file is not None:
        _forget_quantization(model)
    model.eval().requires_grad_(False)
    return model, load_problems(info)


def _forget_quantization(model: PreTrainedModel) -> None:
    """What was dequantized is an ordinary model: transformers 5.x would refuse to save it, or to change its dtype."""
    for attribute in ("hf_quantizer", "quantization_method", "is_quantized"):
        if attribute in vars(model):
            delattr(model, attribute)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def _has_tokenizer(folder: Path, gguf_file: str | None) -> bool:
    if gguf_file is None:
        return any((folder / name).is_file() for name in _TOKENIZER_FILES)
    check_gguf(folder / gguf_file)
    with (folder / gguf_file).open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return data.find(b"tokenizer.ggml.tokens") != -1
