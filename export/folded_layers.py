"""How an artifact tells, in its metadata, which layers it always executes or skips, their gates being folded."""

from collections.abc import Iterable, Mapping

from modcompile.layer_ranges import layers_in, name_of

ALWAYS_ACTIVE, ALWAYS_SKIPPED = "modcompile.always_active", "modcompile.always_skipped"


def told_layers(metadata: Mapping[str, str], key: str) -> frozenset[int]:
    """The layers under ALWAYS_ACTIVE or ALWAYS_SKIPPED."""
    return frozenset(layers_in(metadata[key])) if key in metadata else frozenset()


def names_of(gates: Iterable[range]) -> str:
    """From the layers of gates to a list such as `0-3,7`."""
    return ",".join(map(name_of, gates))
