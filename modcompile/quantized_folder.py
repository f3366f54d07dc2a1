"""The quantized folder: what `quantize` writes, and what models of several precisions are read from.

::

    config.json, generation_config.json, tokenizer files   of the base
    model.safetensors          what is not quantized; with 16 bits asked for, all of the base, loadable on its own
    quantized.safetensors      {weight}.{precision}.packed|scales|zero_points
    quantization_config.json   which precisions, how; the format's version, the names of the weights
    report.json                what was done and measured

A training in it adds, and an evaluation::

    precision_routers.safetensors             routers of precisions (`modcompile.precision_router_files`)
    routers.safetensors, router_config.json   those of depth gates, as in a routed folder (`modcompile.artifacts`)
    training_history.png                      loss and average bits (and the active ratio) over its steps
    training_choices.png                      which share of tokens each block computed with how many bits in the end
    precisions.png                            perplexity against bits, and the same of the evaluation's text

A part completes the precision that it is named after (`modcompile.precisions`). Weights are `[out, in]` here, also
where the base has them the other way round (`transposed` in the configuration).
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modcompile.build_base import build_base
from modcompile.checkpoints import save_base
from modcompile.durable_files import write_json
from modcompile.errors import ArtifactError, ConfigError
from modcompile.output_folder import staged_folder
from modcompile.precision_config import QuantizationConfig
from modcompile.precisions import FULL_PRECISION, MultiPrecisionWeight, PackedWeight, part_bits
from modcompile.versioned_json import read_versioned, versioned

FORMAT_VERSION = 1
QUANTIZATION_CONFIG = "quantization_config.json"
QUANTIZED = "quantized.safetensors"
_BASE_WEIGHTS = "model.safetensors"
_TENSORS = ("packed", "scales", "zero_points")
_AGAIN = "run modcompile.quantize again"


@dataclass(frozen=True)
class QuantizedCheckpoint:
    """A base model and its weights at several precisions."""

    base: PreTrainedModel
    """Holds each weight at the highest precision that was asked for."""
    weights: Mapping[str, MultiPrecisionWeight]
    """By the name that the base has for them."""
    transposed: frozenset[str]
    """Those that the base has as `[in, out]`."""
    config: QuantizationConfig
    """How they were quantized, with the precisions that were asked for."""

    @property
    def precisions(self) -> list[int]:
        """Those that were asked for, the lowest first."""
        return self.config.precisions


def is_quantized_folder(folder: Path) -> bool:
    """Whether the folder was made by `modcompile.quantize`, of whichever version."""
    return (folder / QUANTIZATION_CONFIG).is_file()


def write_quantized_folder(
    checkpoint: QuantizedCheckpoint,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
    *,
    overwrite: bool = False,
) -> None:
    """Write everything; the folder appears whole or not at all. The base must hold the original weights.

    Raises:
        OutputError: the folder can't be written, or holds something that is not ours to replace.
    """
    with staged_folder(folder, overwrite=overwrite, is_ours=is_quantized_folder) as staging:
        save_base(checkpoint.base, tokenizer, staging)
        if FULL_PRECISION not in checkpoint.config.precisions:
            kept = {
                name: tensor
                for name, tensor in load_file(staging / _BASE_WEIGHTS).items()
                if name not in checkpoint.weights
            }
            save_file(kept, staging / _BASE_WEIGHTS, metadata={"format": "pt"})
        save_file(_state(checkpoint.weights), staging / QUANTIZED, metadata={"format": "pt"})
        content = {
            "quantization": asdict(checkpoint.config),
            "weights": {name: weight.in_features for name, weight in checkpoint.weights.items()},
            "transposed": sorted(checkpoint.transposed),
        }
        write_json(staging / QUANTIZATION_CONFIG, versioned(FORMAT_VERSION, content))


def copy_quantized_folder(source: Path, folder: Path, *, overwrite: bool = False) -> None:
    """Copy a folder of `modcompile.quantize` with its routers, and what is told of its making; plots are left out.

    Raises:
        OutputError: the folder can't be written, or holds something that is not ours to replace.
    """
    with staged_folder(folder, overwrite=overwrite, is_ours=is_quantized_folder) as staging:
        for file in source.iterdir():
            if file.is_file() and file.suffix != ".png":
                shutil.copyfile(file, staging / file.name)


def read_quantized_folder(folder: Path, precisions: Sequence[int] | None = None) -> QuantizedCheckpoint:
    """Read a folder for some of its precisions, by default all.

    Raises:
        ArtifactError: the folder is missing, incomplete, damaged, or of another version.
        CheckpointError: its base can't be read.
        ConfigError: it lacks one of `precisions`.
    """
    stored = _read_config(folder)
    try:
        config = QuantizationConfig(**stored["quantization"])
        in_features = {str(name): int(size) for name, size in stored["weights"].items()}
        transposed = frozenset(stored["transposed"])
    except (KeyError, TypeError, ValueError, AttributeError, ConfigError) as error:
        raise ArtifactError(f"{folder / QUANTIZATION_CONFIG} is damaged ({error}); {_AGAIN}") from error
    wanted = choose_precisions(folder, config.precisions, precisions)
    tensors = _load(folder / QUANTIZED)
    weights = {name: _weight(folder, tensors, name, size, config) for name, size in in_features.items()}
    _check_names(folder, weights, tensors)
    base = _load_base(folder, weights, transposed, wanted[-1])
    _check_shapes(folder, weights, transposed, base)
    asked = QuantizationConfig(**asdict(config) | {"precisions": wanted})
    return QuantizedCheckpoint(base, weights, transposed, asked)


def choose_precisions(folder: Path, available: Sequence[int], asked: Sequence[int] | None) -> list[int]:
    """The precisions to read, the lowest first; by default all that are available.

    Raises:
        ConfigError: none is asked for, or one twice, or one that the folder lacks.
    """
    wanted = sorted(available if asked is None else asked)
    if len(set(wanted)) != len(wanted):
        raise ConfigError(f"precisions are {' '.join(map(str, wanted))}; each may be given once")
    missing = [precision for precision in wanted if precision not in available]
    if missing or not wanted:
        raise ConfigError(
            f"{folder} has no weights of {' or '.join(map(str, missing)) or 'no'} bits; "
            f"it has {', '.join(map(str, available))}"
        )
    return wanted


def _state(weights: Mapping[str, MultiPrecisionWeight]) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{precision}.{tensor}": getattr(part, tensor).contiguous()
        for name, weight in weights.items()
        for precision, part in weight.parts.items()
        for tensor in _TENSORS
    }


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise ArtifactError(
            f"{folder} is not a folder; make one with python -m modcompile.quantize MODEL --output_dir {folder}"
        )
    path = folder / QUANTIZATION_CONFIG
    if not path.is_file():
        raise ArtifactError(
            f"{folder} has no {QUANTIZATION_CONFIG}: it was not made by modcompile.quantize, or not to its end"
        )
    return read_versioned(path, FORMAT_VERSION, again=_AGAIN)


def _load(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{path} can't be read ({error}); {_AGAIN}") from error


def _weight(
    folder: Path, tensors: Mapping[str, torch.Tensor], name: str, in_features: int, config: QuantizationConfig
) -> MultiPrecisionWeight:
    nested = config.weight_sharing == "nested"
    groups = -(-in_features // config.group_size)
    parts = {}
    for precision, bits in part_bits(config.precisions, nested=nested).items():
        found = []
        for kind, dtype, tail in zip(
            _TENSORS,
            (torch.uint8, torch.float32, torch.uint8),
            ((groups, config.group_size * bits // 8), (groups,), (groups,)),
            strict=True,
        ):
            key = f"{name}.{precision}.{kind}"
            tensor = tensors.get(key)
            if tensor is None:
                raise ArtifactError(f"{folder / QUANTIZED} lacks {key}; {_AGAIN}")
            if tensor.dtype != dtype or tensor.shape[1:] != tail:
                raise ArtifactError(
                    f"{folder / QUANTIZED}: {key} is {tensor.dtype} {list(tensor.shape)}, not {dtype} "
                    f"[out features, {', '.join(map(str, tail))}]; {_AGAIN}"
                )
            found.append(tensor)
        packed, scales, zero_points = found
        if not len(packed) == len(scales) == len(zero_points):
            raise ArtifactError(f"{folder / QUANTIZED}: the parts of {name}.{precision} differ in length; {_AGAIN}")
        if not torch.isfinite(scales).all():
            raise ArtifactError(f"{folder / QUANTIZED}: {name}.{precision}.scales holds NaN or infinity; {_AGAIN}")
        parts[precision] = PackedWeight(packed, scales, zero_points, bits)
    if len({len(part.packed) for part in parts.values()}) > 1:
        raise ArtifactError(f"{folder / QUANTIZED}: the parts of {name} differ in length; {_AGAIN}")
    return MultiPrecisionWeight(parts, in_features, nested)


def _check_names(
    folder: Path, weights: Mapping[str, MultiPrecisionWeight], tensors: Mapping[str, torch.Tensor]
) -> None:
    """Without its name a weight would be served as the base has it, which nobody would notice."""
    if not weights:
        raise ArtifactError(f"{folder / QUANTIZATION_CONFIG} names no weights; {_AGAIN}")
    unnamed = sorted(tensors.keys() - _state(weights).keys())
    if unnamed:
        raise ArtifactError(
            f"{folder / QUANTIZED} holds {unnamed[0]}, of which {QUANTIZATION_CONFIG} knows nothing; {_AGAIN}"
        )


def _load_base(
    folder: Path, weights: Mapping[str, MultiPrecisionWeight], transposed: frozenset[str], precision: int
) -> PreTrainedModel:
    state = _load(folder / _BASE_WEIGHTS)
    if precision != FULL_PRECISION:
        for name, weight in weights.items():
            dense = weight.dequantize(precision)
            state[name] = (dense.T if name in transposed else dense).contiguous()
    return build_base(folder, state, torch.float32)


def _check_shapes(
    folder: Path, weights: Mapping[str, MultiPrecisionWeight], transposed: frozenset[str], base: PreTrainedModel
) -> None:
    parameters = dict(base.named_parameters())
    for name, weight in weights.items():
        if name not in parameters:
            raise ArtifactError(
                f"{folder / QUANTIZATION_CONFIG} names {name}, which {type(base).__name__} has not; {_AGAIN}"
            )
        shape = list(parameters[name].shape)
        expected = shape[::-1] if name in transposed else shape
        # Of 16 bits alone there are no parts.
        out_features = [len(part.packed) for part in weight.parts.values()][:1] or expected[:-1]
        found = [*out_features, weight.in_features]
        if found != expected:
            raise ArtifactError(f"{folder / QUANTIZED}: {name} is {found}, not {expected} as in the base; {_AGAIN}")
