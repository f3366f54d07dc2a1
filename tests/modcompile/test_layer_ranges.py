import pytest

from modcompile.layer_ranges import layers_in, layers_of, name_of, runs_of


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


@pytest.mark.parametrize(("names", "layers"), [("3", [3]), ("0-2,7", [0, 1, 2, 7]), ("7,0-1", [7, 0, 1])])
def test_a_list_holds_the_layers_of_its_names(names: str, layers: list[int]) -> None:
    assert layers_in(names) == layers


@pytest.mark.parametrize("names", ["", "1,", "3-1", "2,x"])
def test_other_lists_are_refused(names: str) -> None:
    with pytest.raises(ValueError, match=r"invalid literal|ends before it begins"):
        layers_in(names)


@pytest.mark.parametrize(
    ("layers", "runs"),
    [
        ([], []),
        ([4], [range(4, 5)]),
        ([0, 1, 2], [range(3)]),
        ([0, 2, 3, 7], [range(1), range(2, 4), range(7, 8)]),
    ],
)
def test_runs_are_as_long_as_can_be(layers: list[int], runs: list[range]) -> None:
    assert runs_of(layers) == runs
