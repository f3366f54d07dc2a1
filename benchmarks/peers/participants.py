"""Everyone who takes part, with their models made."""

from dataclasses import dataclass
from pathlib import Path

from benchmarks.peers.case import Case
from benchmarks.peers.own_exports import own_cases
from benchmarks.peers.peer_models import PACKAGES, installed_version, pytorch_cases
from benchmarks.peers.source import Source
from modcompile.export.verification import versions
from modcompile.progress import show_elapsed


@dataclass(frozen=True)
class Participants:
    """Ours and the others, in the order of the report."""

    ours: list[Case]
    peers: list[Case]
    models: dict[str, dict[str, float]]
    """What there is to tell of the models that were made, by their names (`built_model`)."""
    versions: dict[str, str]
    """By packages."""
    left_out: list[str]
    """Packages that the environment of the peers lacks."""


def make_participants(source: Source, work: Path, peers: Path) -> Participants:
    """Make all models in `work`; `peers` is the environment of the peers.

    Raises:
        RuntimeError: a command fails.
    """
    with show_elapsed("exporting"):
        ours, models = own_cases(source, work)
    others: list[Case] = []
    used, left_out = versions(), []
    # Absolute, but with its links: a Python that is called by another name leaves its environment.
    python = peers.absolute() / "bin" / "python"
    for package, make in PACKAGES.items():
        version = installed_version(python, package)
        if version is None:
            left_out.append(package)
            continue
        with show_elapsed(f"making the models of {package}"):
            cases, told = make(source, work, python)
        others += cases
        models |= told
        used[package] = version
    return Participants(ours, [*others, *pytorch_cases(source)], models, used, left_out)
