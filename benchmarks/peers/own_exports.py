"""Our side: which exports are measured, and how each is made from the model everyone runs.

A line of `OWN_CASES` is a case; cases of one export share its folder.
"""

import shlex
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.peers.built_model import build_once
from benchmarks.peers.case import Case
from benchmarks.peers.child_python import run_module
from benchmarks.peers.source import Source
from modcompile.artifacts import read_report
from modcompile.export.session import MODEL_FILE, RoutedSession


@dataclass(frozen=True)
class Export:
    """Commands that write an exported folder."""

    name: str
    commands: tuple[str, ...]
    """`python -m` is put before each; {source} is a folder, {model} its name, {blocks_per_gate} what suits its size
    ({coarse_blocks_per_gate} twice of that), {large_groups} what rounds in groups of 128, and {work} a folder that the
    last one leaves an export in, as `onnx`."""

    @property
    def folder_name(self) -> str:
        """Of what `build` writes."""
        return self.name.replace(" ", "_")

    def build(self, source: Source, output: Path) -> dict[str, float]:
        """Write the export into the folder `output`; returns how many of the seconds verification took."""
        with tempfile.TemporaryDirectory(dir=output.parent) as name:
            work = Path(name) / "work"
            for command in self.commands:
                given = {
                    "source": shlex.quote(str(source.folder)),
                    "model": source.name,
                    "work": shlex.quote(str(work)),
                    "blocks_per_gate": source.blocks_per_gate,
                    "coarse_blocks_per_gate": 2 * source.blocks_per_gate,
                    # What a text says of random weights is nothing; to round them for it would take an hour.
                    "large_groups": "--rounding gptq" if source.reads_text else "--group_size 128",
                }
                module, *arguments = shlex.split(command.format_map(given))
                run_module(Path(sys.executable), module, arguments)
            (work / "onnx").rename(output / "onnx")
            return {"verifying_seconds": read_report(work)["export"]["seconds"].get("verifying", 0.0)}


@dataclass(frozen=True)
class OwnCase:
    """An export, and the share of its routed blocks that its session skips, whatever their routers say."""

    name: str
    export: Export
    skipped: float | None = None
    """None leaves the thresholds as exported, as an export without routers needs."""
    huge_pages: bool = True
    """Whether it asks the kernel for huge pages, as modcompile.generate does."""
    scored: bool = False
    """Whether its perplexity says something: of forced or random skipping it does not."""

    def thresholds(self, count: int) -> list[float] | None:
        """One for each of `count` routed blocks; those in the middle are skipped."""
        if self.skipped is None:
            return None
        skipped = round(self.skipped * count)
        first = (count - skipped) // 2
        return [2.0 if first <= block < first + skipped else 0.0 for block in range(count)]


_GATES_PER_DECISION = 5
_REWRITE = (
    "modcompile.rewrite {source} --output_dir {work} --export --verify none --weights int4 --router_hidden_size 0"
)
_LARGE = f"{_REWRITE} {{large_groups}}"
_ROUTE = f"{_LARGE} --gates_per_decision {_GATES_PER_DECISION} --blocks_per_gate"
_DENSE = Export("dense int4", (f"{_REWRITE} --always_active all",))
_DENSE_LARGE = Export("dense int4 in groups of 128", (f"{_LARGE} --always_active all",))
_ROUTED = Export("routed int4 in groups of 128", (f"{_ROUTE} {{blocks_per_gate}}",))
_COARSE = Export("coarsely routed int4 in groups of 128", (f"{_ROUTE} {{coarse_blocks_per_gate}}",))
_RANDOM = "benchmarks.peers.random_routers {source} --model {model} --output_dir {work} --skipped 0.3"
_EXPORT = "modcompile.export {work} --verify none --weights int4 {large_groups} --fold_gates none"
_AT_RANDOM = Export("random routers in groups of 128", (_RANDOM, _EXPORT))
DENSE, DENSE_LARGE = "ours: dense int4", "ours: dense int4, groups of 128"
"""The cases that others of ours are compared with: the routed ones with the second, whose weights they have."""
OWN_CASES = (
    OwnCase(DENSE, _DENSE, scored=True),
    OwnCase("ours: dense int4, plain pages", _DENSE, huge_pages=False),
    OwnCase(DENSE_LARGE, _DENSE_LARGE, scored=True),
    OwnCase("ours: routed int4, groups of 128, none skipped", _ROUTED, skipped=0.0),
    OwnCase("ours: routed int4, groups of 128, 20 % skipped", _ROUTED, skipped=0.2),
    OwnCase("ours: coarsely routed int4, groups of 128, none skipped", _COARSE, skipped=0.0),
    OwnCase("ours: coarsely routed int4, groups of 128, 20 % skipped", _COARSE, skipped=0.2),
    OwnCase("ours: int4, groups of 128, random routers skip 30 %", _AT_RANDOM),
)
"""Routers are linear, one for so many blocks as `Source` says, or for twice as many; those at random one for each."""


def own_cases(source: Source, work: Path) -> tuple[list[Case], dict[str, dict[str, float]]]:
    """The cases, and what there is to tell of their exports."""
    cases, told = [], {}
    for own in OWN_CASES:
        folder = work / own.export.folder_name
        told[f"ours: {own.export.name}"] = build_once(folder, partial(own.export.build, source))
        routed = RoutedSession(folder / "onnx" / MODEL_FILE).num_thresholds if own.skipped is not None else 0
        model = {"folder": str(folder / "onnx"), "thresholds": own.thresholds(routed), "huge_pages": own.huge_pages}
        cases.append(Case(own.name, "ours", Path(sys.executable), model, scored=own.scored))
    return cases, told
