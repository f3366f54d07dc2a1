"""Where a command spends its time and its memory, stage by stage.

A stage is a function or a block under `stage`, which costs next to nothing where nobody profiles. Stages nest: what an
inner one takes is not counted for the outer one, so that the rows of a profile add up.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

_STATUS = Path("/proc/self/status")
_PEAK = "VmHWM:"


@dataclass
class StageCost:
    """What one stage took, all its runs together."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    """Of all threads."""
    peak_mib: int | None = None
    """The most memory that the process had held when the stage last ended; not known outside Linux."""


@dataclass
class Profile:
    """The stages so far, in the order in which they began."""

    costs: dict[str, StageCost] = field(default_factory=dict)
    _running: list[str] = field(default_factory=list)
    _last: tuple[float, float] = (0.0, 0.0)

    def begin(self, name: str) -> None:
        """Go on in stage `name`, within the one that runs."""
        self._charge()
        self.costs.setdefault(name, StageCost())
        self._running.append(name)

    def end(self) -> None:
        """Leave the stage that runs for the one around it."""
        self._charge()
        self.costs[self._running.pop()].peak_mib = _peak_mib()

    def _charge(self) -> None:
        now = (time.perf_counter(), time.process_time())
        if self._running:
            cost = self.costs[self._running[-1]]
            cost.seconds += now[0] - self._last[0]
            cost.cpu_seconds += now[1] - self._last[1]
        self._last = now

    def table(self) -> str:
        """A line for each stage, and one for all."""
        costs = self.costs.values()
        width = max(map(len, self.costs))
        lines = [f"{'stage':{width}}  {'s':>6}  {'CPU s':>6}  {'peak MiB':>8}"]
        whole = StageCost(
            sum(cost.seconds for cost in costs),
            sum(cost.cpu_seconds for cost in costs),
            max((cost.peak_mib for cost in costs if cost.peak_mib is not None), default=None),
        )
        for name, cost in (*self.costs.items(), ("all", whole)):
            peak = "?" if cost.peak_mib is None else f"{cost.peak_mib:,}"
            lines.append(f"{name:{width}}  {cost.seconds:6.2f}  {cost.cpu_seconds:6.2f}  {peak:>8}")
        return "\n".join(lines)


_active: ContextVar[Profile | None] = ContextVar("profile", default=None)


@contextmanager
def stage(name: str) -> Iterator[None]:
    """A block, or with `@stage(name)` a function, whose cost a profile tells under `name`."""
    profile = _active.get()
    if profile is None:
        yield
        return
    profile.begin(name)
    try:
        yield
    finally:
        profile.end()


@dataclass(frozen=True)
class ProfileConfig:
    """Whether a command tells what it costs."""

    profile: bool = field(
        default=False,
        metadata={"help": "Print the time and the peak memory of every stage on stderr, and keep them in report.json."},
    )


@contextmanager
def profiled(config: ProfileConfig, keep: Callable[[Mapping[str, Any]], None]) -> Iterator[None]:
    """If asked for, profile a command; in the end print a table on stderr and `keep` it by the names of the stages.

    What the process did before counts as `importing`; a command that fails is not reported.
    """
    if not config.profile:
        yield
        return
    profile = Profile({"importing": StageCost(_process_age(), time.process_time(), _peak_mib())})
    token = _active.set(profile)
    try:
        with stage("the rest"):
            yield
    finally:
        _active.reset(token)
    print(profile.table(), file=sys.stderr)
    keep({name: asdict(cost) for name, cost in profile.costs.items()})


def _process_age() -> float:
    """Seconds since the process began; its processor time where the system does not tell."""
    try:
        fields = Path("/proc/self/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
        started = int(fields[19])  # in ticks since the system began
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):
        return time.process_time()


def _peak_mib() -> int | None:
    try:
        lines = _STATUS.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) // 1024 for line in lines if line.startswith(_PEAK)), None)
