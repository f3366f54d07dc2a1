"""Continue a prompt in ONNX Runtime, by what `modcompile.export` made."""

from pathlib import Path

import torch
from transformers import GenerationConfig

from modcompile.errors import ArtifactError, ConfigError
from modcompile.progress import show_elapsed
from modcompile.text_generator import TextGenerator, describe_active_ratio
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


def load_onnx(folder: Path, hard_threshold: float | None) -> TextGenerator:
    """Of an exported folder, at a threshold, by default that of its export.

    Raises:
        ArtifactError: ONNX Runtime can't load it.
        ConfigError: there is no ONNX Runtime, or the artifact has no depth gates for a threshold.
    """
    try:
        from modcompile.export import generation
        from modcompile.export.session import RoutedSession
    except ModuleNotFoundError as error:
        raise ConfigError(f"--runtime onnx needs {error.name}: pip install onnxruntime, or onnxruntime-gpu") from error
    with show_elapsed("loading the ONNX model"):
        session = RoutedSession(folder / _MODEL_FILE, thresholds=hard_threshold)

    if hard_threshold is not None and not session.num_thresholds:
        raise ConfigError(f"--hard_threshold needs depth gates, which {folder} has not; leave it out")

    def generate(input_ids: torch.Tensor, config: GenerationConfig, streamer: TimedStreamer) -> str:
        generated = generation.generate(session, input_ids, config, streamer=streamer)
        if generated.bits is not None:
            return generated.bits.describe()
        if generated.usage is not None:
            return describe_active_ratio(generated.usage.active_ratio)
        untold = "average bits" if session.bias_shape[0] else "active ratio"
        return f"{untold} not told by this artifact (export it with --emit_routing)"

    return generate
