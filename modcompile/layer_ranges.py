"""Names of layers, in graphs, artifacts and flags: `2` is layer 2, `2-4` are the layers 2, 3 and 4, `2-4,7` also 7."""

from collections.abc import Sequence


def name_of(layers: range) -> str:
    """From layers, of which there is at least one, to their name."""
    return str(layers[0]) if len(layers) == 1 else f"{layers[0]}-{layers[-1]}"


def layers_of(name: str) -> range:
    """From a name to the layers.

    Raises:
        ValueError: it is no such name.
    """
    first, dash, last = name.partition("-")
    return range(int(first), int(last if dash else first) + 1)


def layers_in(names: str) -> list[int]:
    """From a list of names to the layers, in its order.

    Raises:
        ValueError: it is no such list.
    """
    spans = [layers_of(name) for name in names.split(",")]
    if not all(spans):
        raise ValueError(f"a span of {names!r} ends before it begins")
    return [layer for span in spans for layer in span]


def runs_of(layers: Sequence[int]) -> list[range]:
    """From layers in ascending order to the longest ranges of consecutive ones."""
    runs: list[range] = []
    for layer in layers:
        if runs and runs[-1].stop == layer:
            runs[-1] = range(runs[-1].start, layer + 1)
        else:
            runs.append(range(layer, layer + 1))
    return runs
