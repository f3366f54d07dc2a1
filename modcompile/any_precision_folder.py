"""The folder that any-precision-llm writes, read to be served in PyTorch.

::

    config.json                  of the base, with an entry `anyprec`: seed_precision, parent_precision, group_count, …
    pytorch_model.bin            or model.safetensors, whole or in shards:
      {module}.qweight             int32 [P, N, K / 32], the planes of codes of P = parent_precision bits
      {module}.lut{precision}      float16 [N, 2 ** precision], for each precision from the seed's to the parent's
      …                            what is not quantized, under the names that the base has for it

The layout of the planes is in `modcompile.any_precision`. The original weights are not there.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedModel

from modcompile.any_precision import LookupWeight
from modcompile.build_base import build_base
from modcompile.checkpoint_files import CONFIG, has_safetensors, read_config, weight_files
from modcompile.errors import ArtifactError, CheckpointError
from modcompile.quantized_folder import choose_precisions

_ENTRY = "anyprec"
_PICKLE = "pytorch_model.bin"
_MIN_PRECISION, _MAX_PRECISION = 3, 8
_QUANTIZED = re.compile(r"(.+)\.(?:qweight|lut\d+)")
_AGAIN = "get the folder again from where it came from"


@dataclass(frozen=True)
class AnyPrecisionCheckpoint:
    """A base model and its weights at several precisions, in tables."""

    base: PreTrainedModel
    """In float32, as routers are; holds each weight at the highest precision that was asked for."""
    weights: Mapping[str, LookupWeight]
    """By the name that the base has for them."""
    precisions: list[int]
    """Those that were asked for, the lowest first."""
    transposed: frozenset[str] = frozenset()
    """None: all are as the base has them."""


def is_any_precision_folder(folder: Path) -> bool:
    """Whether the folder says that it was made by any-precision-llm."""
    try:
        return _ENTRY in read_config(folder)
    except CheckpointError:
        return False


def read_any_precision_folder(folder: Path, precisions: Sequence[int] | None = None) -> AnyPrecisionCheckpoint:
    """Read a folder for some of its precisions, by default all.

    Raises:
        ArtifactError: its entry in config.json, or what is quantized, is incomplete or damaged.
        CheckpointError: the rest can't be read.
        ConfigError: it lacks one of `precisions`.
        UnsupportedModelError: it is no causal language model, or quantized in a further way.
    """
    available = _available_precisions(folder)
    wanted = choose_precisions(folder, available, precisions)
    state = _load_tensors(folder)
    modules = sorted({match[1] for match in map(_QUANTIZED.fullmatch, state) if match})
    if not modules:
        raise ArtifactError(f"{folder} has no quantized weights, though its {CONFIG} says so; {_AGAIN}")
    weights = {f"{module}.weight": _take_weight(folder, state, module, available) for module in modules}
    state |= {name: weight.dequantize(wanted[-1]) for name, weight in weights.items()}
    base = build_base(folder, state, torch.float32)
    del base.config.anyprec  # The base itself is an ordinary model.
    unknown = sorted(weights.keys() - dict(base.named_parameters()).keys())
    if unknown:
        raise ArtifactError(f"{folder} has quantized {unknown[0]}, which {type(base).__name__} has not; {_AGAIN}")
    return AnyPrecisionCheckpoint(base, weights, wanted)


def _available_precisions(folder: Path) -> list[int]:
    entry = read_config(folder)[_ENTRY]
    try:
        seed, parent = entry["seed_precision"], entry["parent_precision"]
        groups = entry.get("group_count", 1)  # The first versions had no choice of it, and no such field.
        sound = groups == 1 and _MIN_PRECISION <= seed <= parent <= _MAX_PRECISION
        available = list(range(seed, parent + 1)) if sound else []
    except (KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{folder / CONFIG}: {_ENTRY} is damaged ({error!r}); {_AGAIN}") from error
    if not available:
        raise ArtifactError(
            f"{folder / CONFIG}: {_ENTRY} has precisions from {seed} to {parent} in {groups} groups a row; only those "
            f"from {_MIN_PRECISION} to {_MAX_PRECISION} in one group are known"
        )
    return available


def _load_tensors(folder: Path) -> dict[str, torch.Tensor]:
    # The format's own packer writes a pickle only, so that one is read, by `weights_only`, which runs no code of it.
    if (folder / _PICKLE).is_file() and not has_safetensors(folder):
        return _load_pickle(folder / _PICKLE)
    state: dict[str, torch.Tensor] = {}
    for path in weight_files(folder):
        try:
            state |= load_file(path)
        except (OSError, SafetensorError) as error:
            raise ArtifactError(f"{path} can't be read ({error}); {_AGAIN}") from error
    return state


def _load_pickle(path: Path) -> dict[str, torch.Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # Of the archive, of the pickle in it, and of what it holds.
        raise ArtifactError(
            f"{path} is damaged, or holds more than tensors ({type(error).__name__}), which is not loaded: "
            f"it could run any code; {_AGAIN}"
        ) from error
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in state.items()
    ):
        raise ArtifactError(f"{path} holds something else than tensors by their names; {_AGAIN}")
    return dict(state)


def _take_weight(folder: Path, state: dict[str, torch.Tensor], module: str, available: Sequence[int]) -> LookupWeight:
    """Remove the tensors of a module from `state`, and check them."""
    planes = _take(folder, state, f"{module}.qweight", torch.int32, (available[-1], None, None))
    tables = {
        precision: _take(folder, state, f"{module}.lut{precision}", torch.float16, (planes.shape[1], 2**precision))
        for precision in available
    }
    for precision, table in tables.items():
        if not torch.isfinite(table).all():
            raise ArtifactError(f"{folder}: {module}.lut{precision} holds NaN or infinity; {_AGAIN}")
    return LookupWeight(planes, tables)


def _take(
    folder: Path, state: dict[str, torch.Tensor], name: str, dtype: torch.dtype, shape: tuple[int | None, ...]
) -> torch.Tensor:
    """None stands for any size."""
    if name not in state:
        raise ArtifactError(f"{folder} lacks {name}; {_AGAIN}")
    tensor = state.pop(name)
    fits = tensor.dim() == len(shape) and all(
        wanted in (None, size) for wanted, size in zip(shape, tensor.shape, strict=True)
    )
    if tensor.dtype != dtype or not fits:
        sizes = ", ".join("any" if size is None else str(size) for size in shape)
        raise ArtifactError(f"{folder}: {name} is {tensor.dtype} {list(tensor.shape)}, not {dtype} [{sizes}]; {_AGAIN}")
    return tensor
