"""python -m modcompile.export DIR: write a routed or quantized folder as a verified ONNX folder (DIR/onnx)."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from modcompile.artifacts import update_report
from modcompile.cli import run
from modcompile.export.export_config import ExportConfig
from modcompile.export.export_folder import export_folder
from modcompile.flags import parse_flags
from modcompile.stages import ProfileConfig, profiled


@dataclass(frozen=True)
class _Output:
    output_dir: str | None = field(default=None, metadata={"help": "Where to write (by default onnx in the folder)."})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Replace the output folder even if it was not made by modcompile."}
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and export."""
    config, output, profile, name = parse_flags(
        "modcompile.export",
        __doc__,
        ("folder", "A routed folder (modcompile.rewrite, modcompile.train) or a quantized one (modcompile.quantize)."),
        (ExportConfig, _Output, ProfileConfig),
        argv,
    )
    folder = Path(name)
    target = Path(output.output_dir) if output.output_dir else folder / "onnx"
    with profiled(profile, lambda costs: update_report(folder, "profile", costs)):
        print(export_folder(folder, target, config, overwrite=output.overwrite_output_dir).summary())


if __name__ == "__main__":
    sys.exit(run(main))
