"""The trainings, each a command of its own, in folders that are kept: what is there is not trained again."""

import json
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

from benchmarks.quality.recipes import Recipe
from modcompile.artifacts import read_report
from modcompile.corpus import builtin_documents
from modcompile.durable_files import replace_file

# At a temperature of 0.8 these read better; routers then lost less at 0.95 and 0.9 on prose and WikiText-2, more at 0.8
# everywhere, and on code. Wikipedia and news in the place of two thirds of all text: less on WikiText-2 at 0.95 and
# 0.9, more on all others (one run each, seed 0).
_TEXTS = 256
"""That the model writes, of 256 tokens."""
_PROSE = 128
"""Pieces of the built-in training split, beside what the model writes; a few hundred words each."""
_PIECE = 1000
_EVERY = 8


def training_texts(model: str, folder: Path) -> Path:
    """What the model writes by itself, and a third of built-in prose: a file for `--train_file`, made once."""
    path, own = folder / "train.jsonl", folder / "own.jsonl"
    if not own.is_file():
        _run(f"modcompile.sample {shlex.quote(model)} --texts {_TEXTS} --output_file {shlex.quote(str(own))}")
    if not path.is_file():
        prose = "\n\n".join(builtin_documents("train"))
        starts = [index * (len(prose) - _PIECE) // _PROSE for index in range(_PROSE)]
        pieces = [json.dumps({"text": prose[start : start + _PIECE]}) for start in starts]
        content = "\n".join([own.read_text(encoding="utf-8").strip(), *pieces]) + "\n"
        replace_file(path, lambda staging: staging.write_text(content, encoding="utf-8"))
    return path


def mixed_text(file: Path) -> str:
    """Of what was trained on, a text every so many: what thresholds are searched on should be as broad."""
    lines = file.read_text(encoding="utf-8").splitlines()
    return "\n\n".join(json.loads(line)["text"] for line in lines[::_EVERY])


@dataclass(frozen=True)
class Trained:
    """A training that was done."""

    folder: Path
    command: str
    minutes: float
    """What the whole command took, with rewriting, fitting and evaluating."""


def trained(recipe: Recipe, model: str, texts: Path, steps: int, seed: int, folder: Path) -> Trained:
    """That of a recipe and a seed, done now unless the very same command has been."""
    output = folder / f"{recipe.folder}-seed{seed}"
    command = f"modcompile.train --model_name_or_path {shlex.quote(model)} --train_file {shlex.quote(str(texts))} "
    command += f"--output_dir {shlex.quote(str(output))} --overwrite_output_dir {recipe.flags} --seed {seed} "
    command += f"--max_steps {steps} --warmup_steps {steps // 10} --per_device_train_batch_size 4 "
    command += "--save_strategy no --max_eval_samples 2 --logging_steps 10"
    record = beside(output, ".training.json")
    kept = json.loads(record.read_text()) if record.is_file() and output.is_dir() else {}
    if kept.get("command") != command:
        start = perf_counter()
        _run(command)
        kept = {"command": command, "minutes": (perf_counter() - start) / 60}
        replace_file(record, lambda staging: staging.write_text(json.dumps(kept) + "\n"))
    return Trained(output, command, kept["minutes"])


def beside(folder: Path, ending: str) -> Path:
    """A file next to a folder, of its whole name: what follows a dot in that is no suffix."""
    return folder.with_name(f"{folder.name}{ending}")


def trainable_share(folder: Path) -> float:
    """The parameters of routers and adapters, as a share of all."""
    share: float = read_report(folder)["training"]["parameters"]["trainable_share"]
    return share


def _run(command: str) -> None:
    print(f"\n$ python -m {command}", flush=True)
    subprocess.run([sys.executable, "-m", *shlex.split(command)], check=True)
