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
    """`python -m` is put before each, {source}, {work} and {output} are folders; {work} is gone afterwards."""

    def build(self, source: Path, output: Path) -> dict[str, float]:
        """Write the export into the folder `output`; returns how many of the seconds verification took."""
        with tempfile.TemporaryDirectory(dir=output.parent) as name:
            work = Path(name) / "work"
            for command in self.commands:
                folders = {"source": source, "work": work, "output": output / "onnx"}
                module, *arguments = [part.format_map(folders) for part in shlex.split(command)]
                run_module(Path(sys.executable), module, arguments)
            report = read_report(work if work.is_dir() else source)
        return {"verifying_seconds": report["export"]["seconds"]["verifying"]}


@dataclass(frozen=True)
class OwnCase:
    """An export, and the share of its routed blocks that its session skips, whatever their routers say."""

    name: str
    export: Export
    skipped: float | None = None
    """None leaves the thresholds as exported, as an export without routers needs."""
    huge_pages: bool = True
    """Whether it asks the kernel for huge pages, as modcompile.generate does."""

    def thresholds(self, count: int) -> list[float] | None:
        """One for each of `count` routed blocks; those in the middle are skipped."""
        if self.skipped is None:
            return None
        skipped = round(self.skipped * count)
        first = (count - skipped) // 2
        return [2.0 if first <= block < first + skipped else 0.0 for block in range(count)]


_ROUTED = Export(
    "routed fp32",
    ("modcompile.rewrite {source} --output_dir {work}", "modcompile.export {work} --output_dir {output}"),
)
_FOUR_BITS = Export(
    "4 bits in blocks",
    (
        "modcompile.quantize {source} --output_dir {work} --precisions 4 --group_size 32 --method rtn",
        "modcompile.export {work} --output_dir {output}",
    ),
)
OWN_CASES = (
    OwnCase("ours: 4 bits in blocks, fp32 head", _FOUR_BITS),
    OwnCase("ours: routed fp32, none skipped", _ROUTED, skipped=0.0),
    OwnCase("ours: routed fp32, 20 % skipped", _ROUTED, skipped=0.2),
)


def own_cases(source: Source, work: Path) -> tuple[list[Case], dict[str, dict[str, float]]]:
    """The cases, and what there is to tell of their exports."""
    cases, told = [], {}
    for own in OWN_CASES:
        folder = work / own.export.name.replace(" ", "_")
        told[f"ours: {own.export.name}"] = build_once(folder, partial(own.export.build, source.folder))
        routed = RoutedSession(folder / "onnx" / MODEL_FILE).num_thresholds if own.skipped is not None else 0
        model = {"folder": str(folder / "onnx"), "thresholds": own.thresholds(routed), "huge_pages": own.huge_pages}
        cases.append(Case(own.name, "ours", Path(sys.executable), model, scored=not own.skipped))
    return cases, told
