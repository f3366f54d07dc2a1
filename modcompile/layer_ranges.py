"""Names of layers that share a gate, in graphs and artifacts: `2` is layer 2, `2-4` are the layers 2, 3 and 4."""


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
