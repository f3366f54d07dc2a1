"""The routed folder: what `rewrite` writes, and everything else reads.

::

    config.json, generation_config.json, tokenizer files, model.safetensors   the untouched base
    routers.safetensors       parameters of routers and adapters, `routers.{layer}.{name}`, `adapters.{layer}.{name}`
    router_config.json        which layers are routed, by what, how trained; the format's version
    thresholds.json           for which budget which thresholds, as `modcompile.calibrate` finds them
    report.json               what was done and measured
    training_history.png      losses and the active ratio over the steps of a training
    onnx/                     what `export` makes of it

The routed graph itself is not stored: it is traced again in seconds, by whichever version of torch reads the folder.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from modcompile.calibrated_thresholds import THRESHOLDS, threshold_for
from modcompile.checkpoint_sources import find_checkpoint
from modcompile.checkpoints import load_base, save_base
from modcompile.config import RouterConfig
from modcompile.durable_files import replace_file, write_json
from modcompile.errors import ArtifactError, ConfigError
from modcompile.modeling import RoutedForCausalLM
from modcompile.output_folder import staged_folder
from modcompile.routed_graph import build_routed
from modcompile.router_weights import load_router_weights, save_router_weights
from modcompile.stages import stage
from modcompile.versioned_json import read_versioned, versioned

FORMAT_VERSION = 1
ROUTER_CONFIG = "router_config.json"
ROUTERS = "routers.safetensors"
REPORT = "report.json"
_AGAIN = "run modcompile.rewrite again"


def is_routed_folder(folder: Path) -> bool:
    """Whether the folder was made by modcompile, of whichever version."""
    return (folder / ROUTER_CONFIG).is_file()


def base_files(folder: Path) -> list[Path]:
    """The files of the untouched base in a routed folder: configuration, tokenizer, weights."""
    ours = (ROUTERS, ROUTER_CONFIG, THRESHOLDS, REPORT, "training_args.bin", "trainer_state.json")
    files = [file for file in folder.iterdir() if file.is_file() and file.suffix != ".png"]  # plots are ours, too
    return sorted(file for file in files if file.name not in ours)


def load_with_routers(
    folder: str | Path,
    hard_threshold: float | str | list[float] | None = 0.5,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    use_cache: bool = True,
) -> RoutedForCausalLM:
    """Read a routed folder; hard at a threshold (one, or one for each gate), or soft with None.

    `auto` stands for the thresholds that `modcompile.calibrate` has found first, `auto:0.8` for those of a budget.
    Without `use_cache` the graph takes and returns no keys and values, which suits training.

    Raises:
        ArtifactError: the folder is missing, incomplete, damaged, or of another version.
        CheckpointError: its base can't be read.
        ConfigError: a threshold is negative, infinite or not a number, or there are none for that budget.
    """
    folder = Path(folder)
    config = read_router_config(folder)
    if isinstance(hard_threshold, str):
        hard_threshold = threshold_for(folder, hard_threshold)
    base: Any = load_base(find_checkpoint(str(folder.resolve())))
    try:
        model = build_routed(base.to(device=device, dtype=dtype), config, use_cache=use_cache)
    except ConfigError as error:
        raise ArtifactError(f"{folder / ROUTER_CONFIG} does not fit the model beside it ({error}); {_AGAIN}") from error
    load_routers(model, folder)
    model.set_router_mode(hard_threshold)
    return model


def read_router_config(folder: Path) -> RouterConfig:
    """The configuration of the routers in a routed folder.

    Raises:
        ArtifactError: it is missing, damaged, or of another version.
    """
    if not folder.is_dir():
        raise ArtifactError(
            f"{folder} is not a folder; make one with python -m modcompile.rewrite MODEL --output_dir {folder}"
        )
    path = folder / ROUTER_CONFIG
    if not path.is_file():
        raise ArtifactError(
            f"{folder} has no {ROUTER_CONFIG}: it was not made by modcompile.rewrite, or not to its end"
        )
    stored = read_versioned(path, FORMAT_VERSION, again=_AGAIN)
    try:
        return RouterConfig(**stored["routers"])
    except (KeyError, TypeError, ConfigError) as error:
        raise ArtifactError(f"{path} is damaged ({error}); {_AGAIN}") from error


@stage("writing the routed folder")
def write_routed_folder(
    model: RoutedForCausalLM, tokenizer: PreTrainedTokenizerBase | None, folder: Path, *, overwrite: bool = False
) -> None:
    """Write base, tokenizer and routers; the folder appears whole or not at all.

    Raises:
        OutputError: the folder can't be written, or holds something that is not ours to replace.
    """
    with staged_folder(folder, overwrite=overwrite, is_ours=is_routed_folder) as staging:
        save_base(model.base, tokenizer, staging)
        save_routers(model, staging)


def copy_routed_folder(source: Path, folder: Path, *, overwrite: bool = False) -> None:
    """Copy base, tokenizer and routers, and what is told of their making, to a folder that appears whole or not at all.

    Raises:
        OutputError: the folder can't be written, or holds something that is not ours to replace.
    """
    with staged_folder(folder, overwrite=overwrite, is_ours=is_routed_folder) as staging:
        for file in (*base_files(source), source / ROUTERS, source / ROUTER_CONFIG):
            shutil.copyfile(file, staging / file.name)
        report = read_report(source)
        if "rewrite" in report:
            update_report(staging, "rewrite", report["rewrite"])


def has_trained_routers(folder: Path) -> bool:
    """Whether time was spent on what the folder holds: trained routers, or checkpoints of a training."""
    return is_routed_folder(folder) and ("training" in read_report(folder) or any(folder.glob("checkpoint-*")))


def read_report(folder: Path) -> dict[str, Any]:
    """What `report.json` says; nothing if it is missing or damaged, since it is only told, never relied on."""
    try:
        report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return report if isinstance(report, dict) else {}


def update_report(folder: Path, key: str, data: Mapping[str, Any]) -> None:
    """Replace one part of `report.json`.

    Raises:
        OutputError: it can't be written.
    """
    write_json(folder / REPORT, {**read_report(folder), key: data})


def save_routers(model: RoutedForCausalLM, folder: Path) -> None:
    """Write `routers.safetensors` and `router_config.json` into a folder that exists."""
    save_depth_routers(model.routers, model.router_config, folder, model.adapters)


def save_depth_routers(
    routers: Mapping[int, nn.Module],
    config: RouterConfig,
    folder: Path,
    adapters: Mapping[int, nn.Module] | None = None,
) -> None:
    """The same of routers and adapters, by their layers; each file is written or replaced in one step."""
    replace_file(folder / ROUTERS, lambda staging: save_router_weights(routers, staging, adapters=adapters))
    write_json(folder / ROUTER_CONFIG, versioned(FORMAT_VERSION, {"routers": asdict(config)}))
    (folder / THRESHOLDS).unlink(missing_ok=True)  # they are those of the routers that were there


def load_routers(model: RoutedForCausalLM, folder: Path) -> None:
    """Fill the model's routers and adapters from `routers.safetensors`.

    Raises:
        ArtifactError: the file is missing or damaged, or holds the routers of another model.
    """
    load_depth_routers(model.routers, folder, model.adapters)


def load_depth_routers(
    routers: Mapping[int, nn.Module], folder: Path, adapters: Mapping[int, nn.Module] | None = None
) -> None:
    """Fill routers and adapters, by their layers, from `routers.safetensors`.

    Raises:
        ArtifactError: the file is missing or damaged, or holds the routers of another model.
    """
    load_router_weights(routers, folder / ROUTERS, adapters=adapters, again=_AGAIN)
