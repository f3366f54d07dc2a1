"""Check the files of a checkpoint folder before anything is built from them."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from modcompile.errors import CheckpointError

CONFIG = "config.json"
_WEIGHTS = "model.safetensors"
_WEIGHTS_INDEX = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_GGUF_MAGIC = b"GGUF"


def read_config(folder: Path) -> dict[str, Any]:
    """What `config.json` holds.

    Raises:
        CheckpointError: there is none, or it is not a JSON object that names its `model_type`.
    """
    path = folder / CONFIG
    if not path.is_file():
        gguf = next(iter(sorted(folder.glob("*.gguf"))), None)
        hint = (
            f"give the file itself, {gguf}" if gguf else "give the folder that holds config.json and model.safetensors"
        )
        raise CheckpointError(f"{folder} has no {CONFIG}; {hint}")
    config = _read_object(path)
    if not isinstance(config.get("model_type"), str):
        raise CheckpointError(f'{path} does not name its "model_type"; is it the {CONFIG} of a transformers model?')
    return config


def check_weights(folder: Path) -> dict[str, str]:
    """The safetensors dtype (`F32`, `BF16`, …) of every stored tensor; each file's header is read and checked.

    Raises:
        CheckpointError: there are no safetensors weights, only pickles, or a file is missing, damaged or cut short.
    """
    dtypes: dict[str, str] = {}
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt") as tensors:
                names = tensors.keys()
                dtypes |= {name: tensors.get_slice(name).get_dtype() for name in names}
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path} is damaged or cut short ({error}); get the file again from where it came from"
            ) from error
    return dtypes


def has_safetensors(folder: Path) -> bool:
    """Whether it holds weights as safetensors, whole or in part; files of other names are not its weights."""
    return any((folder / name).is_file() for name in (_WEIGHTS, _WEIGHTS_INDEX))


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold the weights.

    Raises:
        CheckpointError: there are none, only pickles, or one that the index names is missing.
    """
    if (folder / _WEIGHTS).is_file():
        return [folder / _WEIGHTS]
    index = folder / _WEIGHTS_INDEX
    if index.is_file():
        weight_map = _read_object(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f'{index} has no "weight_map"; get the file again from where it came from')
        files = [folder / str(name) for name in sorted(set(map(str, weight_map.values())))]
        for path in files:
            if not path.is_file():
                raise CheckpointError(f"{path} is missing, which {index.name} names; complete the checkpoint")
        return files
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{folder} has its weights as pickle files only ({pickles[0]}), and reading a pickle can run any code; "
            f"convert them to {_WEIGHTS}: load the model where you trust it, and save_pretrained it"
        )
    raise CheckpointError(f"{folder} has no weights; it needs {_WEIGHTS}, or {_WEIGHTS_INDEX} and the files it names")


def check_gguf(path: Path) -> None:
    """Check that a file is what its name says.

    Raises:
        CheckpointError: it does not begin as a GGUF file does, or can't be read.
    """
    try:
        with path.open("rb") as file:
            magic = file.read(len(_GGUF_MAGIC))
    except OSError as error:
        raise CheckpointError(f"{path} can't be read ({error.strerror})") from error
    if magic != _GGUF_MAGIC:
        raise CheckpointError(f"{path} is not a GGUF file, whatever its name; get it again from where it came from")


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not JSON ({error}); get the file again from where it came from") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object; get the file again from where it came from")
    return value
