"""Continue a prompt in ONNX Runtime, by what `modcompile.export` made."""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import GenerationConfig

from modcompile.calibrated_thresholds import THRESHOLDS, threshold_for
from modcompile.errors import ArtifactError, ConfigError
from modcompile.progress import show_elapsed
from modcompile.text_generator import TextGenerator
from modcompile.timed_streamer import TimedStreamer

_MODEL_FILE = "model.onnx"  # as in modcompile.export.session, which can't be imported without onnxruntime


def find_onnx_folder(folder: Path) -> Path:
    """An exported folder itself, or `onnx` in the folder that was exported.

    Raises:
        ArtifactError: neither is there.
    """
    for candidate in (folder, folder / "onnx"):
        if (candidate / _MODEL_FILE).is_file():
            return candidate
    if not folder.is_dir():
        raise ArtifactError(f"{folder} is not a folder; give one that python -m modcompile.export made")
    raise ArtifactError(
        f"{folder} has no {_MODEL_FILE}, nor {folder / 'onnx'}; run python -m modcompile.export {folder}"
    )


def exported_threshold(folder: Path, hard_threshold: float | str | None) -> float | list[float] | None:
    """What `load_onnx` takes for a value of --hard_threshold; `auto` are the thresholds of the gates that are left.

    Raises:
        ArtifactError: the file of calibrated thresholds is damaged.
        ConfigError: the folder has none, or none for that budget.
    """
    if hard_threshold is None:
        return None
    if isinstance(hard_threshold, str) and not (folder / THRESHOLDS).is_file():
        raise ConfigError(
            f"{folder} was exported without calibrated thresholds; run modcompile.calibrate on the routed folder, "
            "and modcompile.export again, or give a number"
        )
    try:
        return threshold_for(folder, hard_threshold)
    except ConfigError as error:
        raise ConfigError(f"{error}, and export again") from error


def load_onnx(folder: Path, hard_threshold: float | Sequence[float] | None, num_threads: int | None) -> TextGenerator:
    """Of an exported folder, at a threshold or one a gate, by default those of its export.

    Without `num_threads`, with a thread for every core.

    Raises:
        ArtifactError: ONNX Runtime can't load it.
        ConfigError: there is no ONNX Runtime, or the artifact has no depth gates for a threshold.
    """
    try:
        from modcompile.export.generation import generate
        from modcompile.export.huge_pages import huge_pages
        from modcompile.export.session import RoutedSession
        from modcompile.export.told_counts import ToldCounts
    except ModuleNotFoundError as error:
        raise ConfigError(f"--runtime onnx needs {error.name}: pip install onnxruntime, or onnxruntime-gpu") from error
    with show_elapsed("loading the ONNX model"), huge_pages():
        session = RoutedSession(folder / _MODEL_FILE, thresholds=hard_threshold, num_threads=num_threads)
        # Its first run allocates.
        generate(session, torch.zeros(1, 1, dtype=torch.long), GenerationConfig(max_new_tokens=1))
    if hard_threshold is not None and not session.num_thresholds:
        raise ConfigError(f"--hard_threshold needs depth gates, which {folder} has not; leave it out")
    counts = ToldCounts(session)

    def continue_prompt(input_ids: torch.Tensor, config: GenerationConfig, streamer: TimedStreamer) -> None:
        generate(session, input_ids, config, streamer=streamer, counts=counts)

    return TextGenerator(continue_prompt, counts.describe)
