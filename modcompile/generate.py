"""python -m modcompile.generate DIR --prompt TEXT: continue a text, in PyTorch or in ONNX Runtime.

The text goes to stdout as it comes, the prompt first; then one line on stderr tells of speed and of the active ratio.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from transformers import GenerationConfig, set_seed

from modcompile.artifacts import load_with_routers, read_router_config
from modcompile.checkpoint_config import load_config
from modcompile.checkpoint_sources import find_checkpoint
from modcompile.cli import run
from modcompile.config import check_choice, check_threshold
from modcompile.errors import ArtifactError, ConfigError
from modcompile.flags import parse_flags
from modcompile.progress import show_elapsed
from modcompile.prompts import check_fits, encode_prompt
from modcompile.required_tokenizer import required_tokenizer
from modcompile.sampling import SamplingConfig, load_generation_config
from modcompile.timed_streamer import TimedStreamer

_MODEL_FILE = "model.onnx"  # as in modcompile.export.session, which can't be imported without onnxruntime

Generate = Callable[[torch.Tensor, GenerationConfig, TimedStreamer], float | None]
"""Continues a prompt `[1, T]` and returns the active ratio, or None if the runtime does not tell it."""


@dataclass(frozen=True)
class GenerateConfig:
    """What is continued, and by which runtime.

    Raises:
        ConfigError: the threshold is negative, infinite or not a number.
    """

    prompt: str = field(metadata={"help": "The text to continue."})
    runtime: Literal["torch", "onnx"] = field(
        default="torch", metadata={"help": "torch: the rewritten graph in PyTorch. onnx: DIR/onnx in ONNX Runtime."}
    )
    hard_threshold: float | None = field(
        default=None,
        metadata={
            "help": "A block is executed where a gate is above this. By default 0.5 in torch, and in onnx what the "
            "artifact was exported with."
        },
    )
    chat: bool = field(
        default=False,
        metadata={
            "help": "Put the prompt as a user's message in the tokenizer's chat template, and print the answer only."
        },
    )

    def __post_init__(self) -> None:
        check_choice("runtime", self.runtime, ("torch", "onnx"))
        if self.hard_threshold is not None:
            check_threshold(self.hard_threshold)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, generate, and say how fast."""
    config, sampling, given = parse_flags(
        "modcompile.generate",
        __doc__,
        ("folder", "A routed folder; for --runtime onnx, it may also be the exported folder itself."),
        (GenerateConfig, SamplingConfig),
        argv,
    )
    folder = Path(given)
    if config.runtime == "onnx":
        folder = _onnx_folder(folder)
    else:
        read_router_config(folder)
    source = find_checkpoint(str(folder.resolve()))
    model_config = load_config(source, folder)
    tokenizer = required_tokenizer(folder)
    input_ids = encode_prompt(tokenizer, config.prompt, chat=config.chat)
    check_fits(input_ids, sampling.max_new_tokens, model_config)
    generation_config = sampling.generation_config(load_generation_config(folder, model_config), tokenizer)
    streamer = TimedStreamer(tokenizer, skip_prompt=config.chat)
    load = _load_onnx if config.runtime == "onnx" else _load_torch
    generate = load(folder, config.hard_threshold)
    set_seed(sampling.seed)  # after loading, which makes routers at random before it fills them
    active_ratio = generate(input_ids, generation_config, streamer)
    print(_summary(streamer, active_ratio), file=sys.stderr)


def _onnx_folder(folder: Path) -> Path:
    for candidate in (folder, folder / "onnx"):
        if (candidate / _MODEL_FILE).is_file():
            return candidate
    if not folder.is_dir():
        raise ArtifactError(f"{folder} is not a folder; give one that python -m modcompile.export made")
    raise ArtifactError(
        f"{folder} has no {_MODEL_FILE}, nor {folder / 'onnx'}; run python -m modcompile.export {folder}"
    )


def _load_torch(folder: Path, hard_threshold: float | None) -> Generate:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with show_elapsed("loading and tracing"):
        model = load_with_routers(folder, 0.5 if hard_threshold is None else hard_threshold, device=device)
        model.hard_graph()  # lowered now, so that the prefill is timed without

    def generate(input_ids: torch.Tensor, config: GenerationConfig, streamer: TimedStreamer) -> float:
        # Else transformers fills in what `config` leaves open from the model's own.
        model.generation_config = config
        tokens = input_ids.to(device)
        model.generate(tokens, attention_mask=torch.ones_like(tokens), streamer=streamer)
        return model.active_ratio

    return generate


def _load_onnx(folder: Path, hard_threshold: float | None) -> Generate:
    try:
        from modcompile.export import generation
        from modcompile.export.session import RoutedSession
    except ModuleNotFoundError as error:
        raise ConfigError(f"--runtime onnx needs {error.name}: pip install onnxruntime, or onnxruntime-gpu") from error
    with show_elapsed("loading the ONNX model"):
        session = RoutedSession(folder / _MODEL_FILE, thresholds=hard_threshold)

    def generate(input_ids: torch.Tensor, config: GenerationConfig, streamer: TimedStreamer) -> float | None:
        usage = generation.generate(session, input_ids, config, streamer=streamer).usage
        return None if usage is None else usage.active_ratio

    return generate


def _summary(streamer: TimedStreamer, active_ratio: float | None) -> str:
    rates = {"prefill": streamer.prefill_rate, "decode": streamer.decode_rate}
    parts = [f"{streamer.new_tokens} new token{'s' if streamer.new_tokens != 1 else ''}"]
    parts += [f"{name} {rate:.1f} tokens/s" for name, rate in rates.items() if rate is not None]
    parts.append(
        "active ratio not told by this artifact (export it with --emit_routing)"
        if active_ratio is None
        else f"active ratio {active_ratio:.3f}"
    )
    return ", ".join(parts)


if __name__ == "__main__":
    sys.exit(run(main))
