"""python -m modcompile.generate DIR --prompt TEXT: continue a text, in PyTorch or in ONNX Runtime.

The text goes to stdout as it comes, the prompt first; then one line on stderr tells of speed, and of the active ratio,
or for a quantized folder the average bits of a token's blocks. On a terminal its last row tells the same as it goes.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from transformers import set_seed

from modcompile.artifacts import is_routed_folder, read_router_config
from modcompile.calibrated_thresholds import check_hard_threshold, number_for, parse_threshold
from modcompile.checkpoint_config import load_config
from modcompile.checkpoint_sources import find_checkpoint
from modcompile.cli import run
from modcompile.config import check, check_choice
from modcompile.errors import ConfigError
from modcompile.flags import parse_flags
from modcompile.generate_onnx import exported_threshold, find_onnx_folder, load_onnx
from modcompile.generate_torch import load_quantized, load_routed
from modcompile.precision_folder import holds_precisions
from modcompile.prompts import check_fits, encode_prompt
from modcompile.required_tokenizer import required_tokenizer
from modcompile.sampling import SamplingConfig, load_generation_config
from modcompile.status_line import StatusLine
from modcompile.text_generator import TextGenerator
from modcompile.timed_streamer import TimedStreamer
from modcompile.torch_threads import torch_threads


@dataclass(frozen=True)
class GenerateConfig:
    """What is continued, and by which runtime.

    Raises:
        ConfigError: the threshold is negative, infinite or not a number, there is no thread, or precisions are fixed in
            ONNX Runtime.
    """

    prompt: str = field(metadata={"help": "The text to continue."})
    runtime: Literal["torch", "onnx"] = field(
        default="torch", metadata={"help": "torch: the rewritten graph in PyTorch. onnx: DIR/onnx in ONNX Runtime."}
    )
    hard_threshold: float | str | None = field(
        default=None,
        metadata={
            "parse": parse_threshold,
            "help": "A block is executed where a gate is above this. By default 0.5 in torch, and in onnx what the "
            "artifact was exported with. auto: what modcompile.calibrate found first; auto:0.8: for a budget; in onnx "
            "those found before the export, of the gates that it kept.",
        },
    )
    fix_precision: int | None = field(
        default=None,
        metadata={
            "help": "Compute all blocks of a quantized folder with so many bits, in torch. By default their routers "
            "choose."
        },
    )
    num_threads: int | None = field(
        default=None,
        metadata={"help": "Compute with so many threads of the CPU. By default with one for each core."},
    )
    chat: bool = field(
        default=False,
        metadata={
            "help": "Put the prompt as a user's message in the tokenizer's chat template, and print the answer only."
        },
    )

    def __post_init__(self) -> None:
        check_choice("runtime", self.runtime, ("torch", "onnx"))
        if self.num_threads is not None:
            check("num_threads", self.num_threads, at_least=1)
        if self.hard_threshold is not None:
            check_hard_threshold(self.hard_threshold)
        if self.fix_precision is not None and self.runtime != "torch":
            raise ConfigError(f"--fix_precision has no effect with --runtime {self.runtime}; leave out one of them")


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, generate, and say how fast."""
    config, sampling, given = parse_flags(
        "modcompile.generate",
        __doc__,
        ("folder", "A routed or quantized folder; for --runtime onnx, it may also be the exported folder itself."),
        (GenerateConfig, SamplingConfig),
        argv,
    )
    folder = Path(given)
    if config.runtime == "onnx":
        folder = find_onnx_folder(folder)
    load = _loader(folder, config)
    source = find_checkpoint(str(folder.resolve()))
    model_config = load_config(source, folder)
    tokenizer = required_tokenizer(folder)
    input_ids = encode_prompt(tokenizer, config.prompt, chat=config.chat)
    check_fits(input_ids, sampling.max_new_tokens, model_config)
    generation_config = sampling.generation_config(load_generation_config(folder, model_config), tokenizer)
    with torch_threads(config.num_threads):
        generator = load()
        set_seed(sampling.seed)  # after loading, which makes routers at random before it fills them
        with StatusLine() as status:
            streamer = TimedStreamer(
                tokenizer,
                skip_prompt=config.chat,
                on_put=lambda streamer: status.show(partial(_progress, streamer, generator)),
            )
            generator.generate(input_ids, generation_config, streamer)
    print(_summary(streamer, generator), file=sys.stderr)


def _loader(folder: Path, config: GenerateConfig) -> Callable[[], TextGenerator]:
    """What loads the folder, once it is known to be one for the flags."""
    if config.runtime == "onnx":
        return partial(load_onnx, folder, exported_threshold(folder, config.hard_threshold), config.num_threads)
    if holds_precisions(folder):
        if config.hard_threshold is not None and not is_routed_folder(folder):
            raise ConfigError(f"--hard_threshold needs depth gates, which {folder} has not; leave it out")
        return partial(load_quantized, folder, _number(folder, config), config.fix_precision)
    read_router_config(folder)
    if config.fix_precision is not None:
        raise ConfigError(f"--fix_precision needs weights at several precisions, which {folder} has not; leave it out")
    return partial(load_routed, folder, config.hard_threshold)


def _number(folder: Path, config: GenerateConfig) -> float | None:
    return None if config.hard_threshold is None else number_for(folder, config.hard_threshold)


def _progress(streamer: TimedStreamer, generator: TextGenerator) -> str:
    if not streamer.new_tokens:
        return f"reading the prompt, {streamer.prompt_tokens} tokens"
    return _summary(streamer, generator)


def _summary(streamer: TimedStreamer, generator: TextGenerator) -> str:
    rates = {"prefill": streamer.prefill_rate, "decode": streamer.decode_rate}
    parts = [f"{streamer.new_tokens} new token{'s' if streamer.new_tokens != 1 else ''}"]
    parts += [f"{name} {rate:.1f} tokens/s" for name, rate in rates.items() if rate is not None]
    return ", ".join([*parts, generator.describe()])


if __name__ == "__main__":
    sys.exit(run(main))
