"""How an artifact tells, in its metadata, which layers it always executes or skips, their gates being folded."""

from collections.abc import Iterable, Mapping

from modcompile.layer_ranges import layers_of, name_of

ALWAYS_ACTIVE, ALWAYS_SKIPPED = "modcompile.always_active", "modcompile.always_skipped"


def told_layers(metadata: Mapping[str, str], key: str) -> frozenset[int]:
    """The layers under ALWAYS_ACTIVE or ALWAYS_SKIPPED."""
    return frozenset(layers_in(metadata[key])) if key in metadata else frozenset()


def names_of(gates: Iterable[range]) -> str:
    """From the layers of gates to a list such as `0-3,7`."""
    return ",".join(map(name_of, gates))


def layers_in(names: str) -> list[int]:
    """From such a list to the layers.

    Raises:
        ValueError: it is no such list.
    """
    spans = [layers_of(name) for name in names.split(",")]
    if not all(spans):
        raise ValueError(f"a span of {names!r} ends before it begins")
    return [layer for span in spans for layer in span]
