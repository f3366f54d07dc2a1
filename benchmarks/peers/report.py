"""The results as Markdown."""

from collections.abc import Sequence
from typing import Any

from benchmarks.peers.figures import Quartiles, ratios_to, spread_of
from benchmarks.peers.rounds import Rounds


def report(result: dict[str, Any]) -> str:
    """Speeds, ratios to our dense exports and to every peer, perplexity, and how they were taken.

    `result` is what JSON holds.
    """
    rounds, counts = result["rounds"], result["tokens"]
    columns = {
        "prefill": f"prefill of {counts['prompt']}, tokens/s",
        "prefill_long": f"prefill of {counts['long_prompt']}, tokens/s",
        "decode": f"decode after {counts['prompt']}, tokens/s",
        **({"decode_context": f"decode after {counts['context']}, tokens/s"} if counts["context"] else {}),
        "resident_mib": "resident MiB",
        "resident_before_mib": "before loading",
    }
    lines = _table(columns, {figure: spread_of(rounds, figure) for figure in columns}, list(rounds), _plain)
    for figure in ("decode", "prefill", "prefill_long", "decode_context", "resident_mib"):
        if figure in columns:
            lines += _ratios(rounds, figure, columns[figure], result["peers"], result["baselines"])
    if result["perplexity"]:
        lines += ["", "| case | perplexity |", "|---|---|"]
        lines += [f"| {name} | {value:.2f} |" for name, value in result["perplexity"].items()]
    lines += ["", "| model | written in, s | of which verification | MB |", "|---|---|---|---|"]
    for name, built in result["models"].items():
        verifying = f"{built['verifying_seconds']:.0f}" if "verifying_seconds" in built else ""
        lines.append(f"| {name} | {built['seconds']:.0f} | {verifying} | {built['megabytes']:.0f} |")
    lines += ["", *(f"- {note}" for note in result["notes"]), ""]
    return "\n".join(lines)


def _ratios(rounds: Rounds, figure: str, title: str, peers: Sequence[str], baselines: Sequence[str]) -> list[str]:
    others = [name for name in (*baselines, *peers) if name in rounds and figure in rounds[name][0]]
    against = {other: ratios_to(rounds, figure, other) for other in others}
    names = [name for name in rounds if name not in peers and figure in rounds[name][0]]
    if not against or not names:
        return []
    heading = {other: f"against {other}" for other in against}
    return ["", f"{title[0].upper()}{title[1:]}, as a multiple:", "", *_table(heading, against, names, _multiple)]


def _table(columns: dict[str, str], values: dict[str, dict[str, Quartiles]], names: list[str], cell: Any) -> list[str]:
    lines = [f"| case | {' | '.join(columns.values())} |", "|---" * (len(columns) + 1) + "|"]
    for name in names:
        cells = [cell(values[column][name]) if name in values[column] else "" for column in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _plain(value: Quartiles) -> str:
    lower, median, upper = value
    digits = 0 if median >= 100 else 1
    return f"{median:.{digits}f} ({lower:.{digits}f} to {upper:.{digits}f})"


def _multiple(value: Quartiles) -> str:
    lower, median, upper = value
    return f"{median:.2f} x ({lower:.2f} to {upper:.2f})"
