"""The trainings, each a command of its own, in folders that are kept: what is there is not trained again."""

import json
import shlex
import subprocess
import sys
from pathlib import Path
from time import perf_counter

from benchmarks.quality.recipes import Recipe
from modcompile.artifacts import read_report
from modcompile.corpus import builtin_documents
from modcompile.durable_files import replace_file

_PROSE = 64
"""Pieces of the built-in training split, beside what the model writes; a few hundred words each."""
_PIECE = 1000


def training_texts(model: str, folder: Path) -> Path:
    """What the model writes by itself, and a third of built-in prose: a file for `--train_file`, made once."""
    path, own = folder / "train.jsonl", folder / "own.jsonl"
    if not own.is_file():
        _run(f"modcompile.sample {shlex.quote(model)} --output_file {shlex.quote(str(own))}")
    if not path.is_file():
        prose = "\n\n".join(builtin_documents("train"))
        starts = [index * (len(prose) - _PIECE) // _PROSE for index in range(_PROSE)]
        pieces = [json.dumps({"text": prose[start : start + _PIECE]}) for start in starts]
        content = "\n".join([own.read_text(encoding="utf-8").strip(), *pieces]) + "\n"
        replace_file(path, lambda staging: staging.write_text(content, encoding="utf-8"))
    return path


def trained(recipe: Recipe, model: str, texts: Path, steps: int, seed: int, folder: Path) -> Path:
    """The folder of a recipe and a seed, trained now if it is not there."""
    output = folder / f"{recipe.folder}-seed{seed}"
    if not _is_trained(output, steps):
        command = f"modcompile.train --model_name_or_path {shlex.quote(model)} --train_file {shlex.quote(str(texts))} "
        command += f"--output_dir {shlex.quote(str(output))} --overwrite_output_dir {recipe.flags} --seed {seed} "
        command += f"--max_steps {steps} --warmup_steps {steps // 10} --per_device_train_batch_size 4 "
        command += "--save_strategy no --max_eval_samples 2 --logging_steps 10"
        start = perf_counter()
        _run(command)
        _taken(output).write_text(f"{(perf_counter() - start) / 60}\n")
    return output


def minutes(folder: Path) -> float:
    """How long the command of a training took, with rewriting, fitting and evaluating."""
    return float(_taken(folder).read_text())


def trainable_share(folder: Path) -> float:
    """The parameters of routers and adapters, as a share of all."""
    share: float = read_report(folder)["training"]["parameters"]["trainable_share"]
    return share


def _taken(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.minutes")


def _is_trained(folder: Path, steps: int) -> bool:
    training = read_report(folder).get("training", {})
    return bool(training.get("steps") == steps and "metrics" in training and _taken(folder).is_file())


def _run(command: str) -> None:
    print(f"\n$ python -m {command}", flush=True)
    subprocess.run([sys.executable, "-m", *shlex.split(command)], check=True)
