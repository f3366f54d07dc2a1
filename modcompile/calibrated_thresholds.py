"""thresholds.json in a routed folder: for which budget which thresholds, as `modcompile.calibrate` found them.

In an exported folder, it has those of the gates that are left.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from modcompile.config import check_threshold
from modcompile.durable_files import write_json
from modcompile.errors import ArtifactError, ConfigError
from modcompile.versioned_json import read_versioned, versioned

THRESHOLDS = "thresholds.json"
AUTO = "auto"
FORMAT_VERSION = 1
_AGAIN = "run modcompile.calibrate again"

ThresholdScope = Literal["global", "per_layer", "searched"]


@dataclass(frozen=True)
class CalibratedThresholds:
    """What was found for one budget."""

    target_active_ratio: float
    thresholds: tuple[float, ...]
    """One a gate."""
    active_ratio: float
    """Measured with them, on the calibration text, with all gates."""
    scope: ThresholdScope


def write_thresholds(found: Sequence[CalibratedThresholds], folder: Path) -> None:
    """Write the thresholds, in the place of those that the folder has.

    Raises:
        OutputError: they can't be written; what was there before still is.
    """
    content = {"calibrated": [asdict(each) for each in found]}
    write_json(folder / THRESHOLDS, versioned(FORMAT_VERSION, content))


def read_thresholds(folder: Path) -> list[CalibratedThresholds]:
    """What `write_thresholds` wrote.

    Raises:
        ArtifactError: it is missing, damaged, or of another version.
    """
    path = folder / THRESHOLDS
    if not path.is_file():
        raise ArtifactError(
            f"{folder} has no {THRESHOLDS}; make it with python -m modcompile.calibrate {folder}, or give a number"
        )
    stored = read_versioned(path, FORMAT_VERSION, again=_AGAIN)
    try:
        return [
            CalibratedThresholds(**{**each, "thresholds": tuple(map(check_threshold, each["thresholds"]))})
            for each in stored["calibrated"]
        ]
    except (KeyError, TypeError, ConfigError) as error:
        raise ArtifactError(f"{path} is damaged ({error}); {_AGAIN}") from error


def calibrated_for(folder: Path, gates: int) -> list[CalibratedThresholds]:
    """The same, or nothing where nothing is calibrated.

    Raises:
        ArtifactError: the file is damaged, of another version, or of a model with another number of gates.
    """
    if not (folder / THRESHOLDS).is_file():
        return []
    found = read_thresholds(folder)
    for each in found:
        if len(each.thresholds) != gates:
            raise ArtifactError(
                f"{folder / THRESHOLDS} has {len(each.thresholds)} thresholds for {gates} gates; {_AGAIN}"
            )
    return found


def parse_threshold(text: str) -> float | str:
    """A number, `auto`, or `auto:0.8`, from a command line.

    Raises:
        ValueError: it is neither.
    """
    name, _, budget = text.partition(":")
    if name != AUTO:
        return float(text)
    return f"{AUTO}:{float(budget):g}" if budget else AUTO


def check_hard_threshold(value: float | str) -> None:
    """Refuse a value of --hard_threshold that `parse_threshold` would not make.

    Raises:
        ConfigError: it is no threshold, and not of the form auto or auto:0.8.
    """
    if not isinstance(value, str):
        check_threshold(value)
        return
    try:
        if not isinstance(parse_threshold(value), str):
            raise ValueError
    except ValueError:
        raise ConfigError(f"--hard_threshold is {value!r}; it must be a number, auto, or auto:0.8, say") from None


def number_for(folder: Path, hard_threshold: float | str) -> float:
    """A number as it is, where there can be nothing else.

    Raises:
        ConfigError: it is `auto`.
    """
    if isinstance(hard_threshold, str):
        raise ConfigError(
            f"--hard_threshold {hard_threshold} is for routed folders without precisions; give a number for {folder}"
        )
    return hard_threshold


def threshold_for(folder: Path, hard_threshold: float | str) -> float | list[float]:
    """A number as it is; `auto` as the thresholds calibrated first in `folder`, `auto:0.8` as those of that budget.

    Raises:
        ArtifactError: there are none, or the file is damaged.
        ConfigError: it is none of these, or there are none for that budget.
    """
    check_hard_threshold(hard_threshold)
    if not isinstance(hard_threshold, str):
        return hard_threshold
    found = read_thresholds(folder)
    _, _, budget = hard_threshold.partition(":")
    if not budget:
        return list(found[0].thresholds)
    for each in found:
        if abs(each.target_active_ratio - float(budget)) < 1e-9:
            return list(each.thresholds)
    known = " ".join(f"{each.target_active_ratio:g}" for each in found)
    raise ConfigError(
        f"{folder / THRESHOLDS} has thresholds for {known}, none for {budget}; give modcompile.calibrate "
        f"--target_active_ratio {known} {budget}"
    )
