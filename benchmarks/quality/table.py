"""The measurements of all seeds, as tables."""

from collections.abc import Sequence
from typing import Any

from benchmarks.quality.figures import Point, perplexity_at, share_of_loss, told
from benchmarks.quality.recipes import ORIGINAL, RANDOM, ROUTED, SEARCHED, STATIC

_WAYS = (ROUTED, SEARCHED, STATIC, RANDOM)


def points_of(result: dict[str, Any], way: str, text: str) -> list[list[Point]]:
    """By seed, those of a way of skipping on a text; a seed in which it was not measured is left out."""
    return [[Point(point["work"], point["perplexity"]) for point in points] for points in _measured(result, way, text)]


def _measured(result: dict[str, Any], way: str, text: str) -> list[list[dict[str, float]]]:
    """The same with all that was written of them."""
    seeds = [seed.get("points", {}).get(way, {}).get(text, []) for seed in result["seeds"].values()]
    return [points for points in seeds if points]


def tables(result: dict[str, Any], works: Sequence[float]) -> str:
    """Perplexity against dense at shares of the work, and what routers lose as a share of static selection."""
    texts = list(result["texts"])
    seeds = sum("points" in seed for seed in result["seeds"].values())
    told_how = (
        f"{result['model']}, {result['steps']} steps of 4 x 256 tokens, {seeds} seed{'s' if seeds > 1 else ''}, up to "
        f"{result['windows']} windows of {result['window']} tokens of each text; median (range) of the seeds. "
        "Perplexity against dense, at shares of the work of all blocks: on straight lines, in its logarithm, "
        "between what was measured."
    )
    told_cost = (
        f"Routers and adapters have {told(_routed(result, 'trainable_share', 100))} % of the parameters; fitting and "
        f"training them took {told(_routed(result, 'minutes'))} minutes."
    )
    parts = [
        told_how,
        _table(["text", "", *(f"{work:g}" for work in works)], _rows(result, texts, works)),
        "What was executed on each text, where thresholds were calibrated on other text:",
        _table(["text", *(f"{work:g}" for work in result["targets"])], _work_rows(result, ROUTED, texts)),
    ]
    if searched := _work_rows(result, SEARCHED, texts):
        parts.append("The same where each gate's threshold was searched (`--threshold_scope searched`), on other text:")
        targets = result["searched_targets"]
        parts.append(_table(["text", *(f"{work:g}" for work in targets)], searched))
    if original := _original_rows(result, texts):
        parts.append("The original's recipe (soft gates, trained for 0.8, threshold 0.5):")
        parts.append(_table(["text", "work", "perplexity against dense"], original))
    parts.append(told_cost)
    return "\n\n".join(parts) + "\n"


def _routed(result: dict[str, Any], name: str, scale: float = 1.0) -> list[float]:
    return [seed[name] * scale for seed in result["seeds"].values() if name in seed]


def _rows(result: dict[str, Any], texts: Sequence[str], works: Sequence[float]) -> list[list[str]]:
    rows = []
    for text in texts:
        found = {
            way: [[perplexity_at(points, work) for work in works] for points in points_of(result, way, text)]
            for way in _WAYS
        }
        rows += [[text, way, *map(told, zip(*found[way], strict=True))] for way in _WAYS if found[way]]
        for way in (ROUTED, SEARCHED):
            shares = _shares(result, way, text, works)
            if shares:
                rows.append([text, f"{way}: loss, as a share of static's", *map(told, zip(*shares, strict=True))])
    return rows


def _shares(result: dict[str, Any], way: str, text: str, works: Sequence[float]) -> list[list[float | None]]:
    """Of the seeds that have static selections, too."""
    both = [seed for seed in result["seeds"].values() if {way, STATIC} <= seed.get("points", {}).keys()]
    ours, theirs = (points_of({"seeds": dict(enumerate(both))}, each, text) for each in (way, STATIC))
    return [
        [share_of_loss(perplexity_at(one, work), perplexity_at(other, work)) for work in works]
        for one, other in zip(ours, theirs, strict=True)
    ]


def _work_rows(result: dict[str, Any], way: str, texts: Sequence[str]) -> list[list[str]]:
    """At the thresholds that are for the targets, not beside them."""
    rows = []
    for text in texts:
        seeds = _measured(result, way, text)
        works = [[point["work"] for point in seed if not point.get("moved")] for seed in seeds]
        if works:
            rows.append([text, *map(told, zip(*works, strict=True))])
    return rows


def _original_rows(result: dict[str, Any], texts: Sequence[str]) -> list[list[str]]:
    rows = []
    for text in texts:
        points = [point for seed in points_of(result, ORIGINAL, text) for point in seed]
        if points:
            rows.append([text, told([each.work for each in points]), told([each.perplexity for each in points])])
    return rows


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
