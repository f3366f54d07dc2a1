"""How an artifact tells, in its metadata, what each routed layer counts in an active ratio, where they differ."""

import json
from collections.abc import Mapping

_WORK = "modcompile.work"


def work_metadata(work: Mapping[int, float]) -> dict[str, str]:
    """What to add to the metadata: nothing where all count alike."""
    return {_WORK: json.dumps(dict(work))} if len(set(work.values())) > 1 else {}


def told_work(metadata: Mapping[str, str]) -> dict[int, float]:
    """By layer; empty where all count alike."""
    told: dict[str, float] = json.loads(metadata.get(_WORK, "{}"))
    return {int(layer): float(work) for layer, work in told.items()}
