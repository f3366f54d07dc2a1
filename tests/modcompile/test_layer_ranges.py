import pytest

from modcompile.layer_ranges import layers_of, name_of


@pytest.mark.parametrize(
    ("layers", "name"), [(range(1), "0"), (range(12, 13), "12"), (range(2), "0-1"), (range(8, 11), "8-10")]
)
def test_names_say_the_first_and_the_last_layer(layers: range, name: str) -> None:
    assert name_of(layers) == name
    assert layers_of(name) == layers


@pytest.mark.parametrize("name", ["", "x", "2-", "-2", "2-x", "2.5"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="invalid literal"):
        layers_of(name)
