"""python -m modcompile.evaluate DIR: what the routers of a folder score on a text, beside what they are to beat.

Routed: perplexity, loss and active ratio, dense, soft and hard; with --sweep, at several shares of the work, beside
static and random skipping, plotted in DIR/sweep.png. Quantized: perplexity and bits of the router, of every
precision, and of the best static allocations; plotted in DIR/precisions.png. Depth gates decide for the router alone,
hard; with --sweep, all of these at several thresholds, by the bytes of weights that a token reads.

Prints a table, and writes the numbers into DIR/report.json under "evaluation".
"""

import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import transformers

from modcompile.artifacts import is_routed_folder, update_report
from modcompile.calibrated_thresholds import number_for
from modcompile.cli import run
from modcompile.errors import ConfigError
from modcompile.evaluate_depth import DepthEvaluationConfig, evaluate_depth
from modcompile.evaluate_precisions import PrecisionEvaluationConfig, evaluate_quantized
from modcompile.evaluation_text import EvaluationTextConfig
from modcompile.flags import parse_flags
from modcompile.precision_folder import holds_precisions
from modcompile.reused_memory import reuse_freed_memory
from modcompile.version import __version__


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, evaluate, print and write."""
    depth, precisions, text, given = parse_flags(
        "modcompile.evaluate",
        __doc__,
        ("folder", "A routed folder (modcompile.rewrite, modcompile.train) or a quantized one (modcompile.quantize)."),
        (DepthEvaluationConfig, PrecisionEvaluationConfig, EvaluationTextConfig),
        argv,
    )
    folder = Path(given)
    if holds_precisions(folder):
        if is_routed_folder(folder):
            taken = ("hard_threshold", "sweep", "sweep_active_ratios")
            _refuse(depth, f"{folder} is quantized, and evaluated one sequence a call", but=taken)
        else:
            _refuse(depth, f"{folder} is quantized, not routed")
        ratios = depth.sweep_active_ratios if depth.sweep else []
        result = evaluate_quantized(folder, text, precisions, number_for(folder, depth.hard_threshold), ratios)
    else:
        if is_routed_folder(folder):
            _refuse(precisions, f"{folder} is routed, not quantized")
        result = evaluate_depth(folder, text, depth)
    versions = {"modcompile": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    update_report(folder, "evaluation", {**result, "versions": versions})


def _refuse(config: Any, why: str, *, but: Sequence[str] = ()) -> None:
    """Raise a ConfigError that names the flags that were given, if any, `but` for some that are taken."""
    default = type(config)()
    given = [
        f"--{field.name}"
        for field in fields(config)
        if field.name not in but and getattr(config, field.name) != getattr(default, field.name)
    ]
    if given:
        raise ConfigError(f"{why}: leave out {', '.join(given)}")


if __name__ == "__main__":
    reuse_freed_memory()
    sys.exit(run(main))
