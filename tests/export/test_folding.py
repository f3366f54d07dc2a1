import pytest

from modcompile.errors import ConfigError
from modcompile.export.folded_layers import ALWAYS_ACTIVE, ALWAYS_SKIPPED, told_layers
from modcompile.export.folding import UNFOLDED, Folding, asked_folding
from modcompile.granularity import Granularity, halves_of

GATES = (range(2, 4), range(4, 6), range(6, 7))


def test_asks_for_gates_by_their_layers() -> None:
    assert asked_folding("2-3,6", "4,5", GATES) == Folding((GATES[0], GATES[2]), (GATES[1],))
    assert asked_folding("all", None, GATES) == Folding(GATES)
    assert asked_folding(None, None, GATES) == UNFOLDED


@pytest.mark.parametrize(
    ("granularity", "named", "found"),
    [
        ("attn+mlp", "1", (2, 3)),
        ("attn+mlp", "1.mlp", (3,)),
        ("attn+mlp", "1-2", (2, 3, 4, 5)),
        ("attn+mlp", "2.mlp,1.attn,1", (2, 3, 5)),
        ("mlp", "1,2.mlp", (3, 5)),
        ("attn", "1-2", (2, 4)),
    ],
)
def test_layers_are_those_of_the_model_where_gates_are_of_halves(
    granularity: Granularity, named: str, found: tuple[int, ...]
) -> None:
    gates = [range(half, half + 1) for layer in (1, 2) for half in halves_of(layer, granularity)]
    expected = tuple(range(half, half + 1) for half in found)
    assert asked_folding(named, None, gates, granularity) == Folding(expected)
    assert asked_folding(None, named, gates, granularity) == Folding((), expected)


@pytest.mark.parametrize(
    ("active", "skipped", "message"),
    [
        ("0", None, r"--always_active names layer 0, which has no gate; gates have 1-2"),
        ("1.attn", None, r"--always_active is '1.attn'; give layers, such as 0-3,7.mlp, or all"),
        ("1", "1.mlp", r"--always_active and --always_skipped both name layer 1.mlp; take one of them"),
    ],
)
def test_refuses_halves_without_gates(active: str, skipped: str | None, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}$"):
        asked_folding(active, skipped, (range(3, 4), range(5, 6)), "mlp")


@pytest.mark.parametrize(
    ("active", "skipped", "message"),
    [
        ("2-", None, r"--always_active is '2-'; give layers, such as 0-3,7, or all"),
        ("", None, r"--always_active is ''; give layers, such as 0-3,7, or all"),
        (None, "6-4", r"--always_skipped is '6-4'; give layers, such as 0-3,7, or all"),
        ("1-3", None, r"--always_active names layer 1, which has no gate; gates have 2-3,4-5,6"),
        (None, "7", r"--always_skipped names layer 7, which has no gate; gates have 2-3,4-5,6"),
        ("4", None, r"--always_active leaves out layer 5 of 4-5, which share a gate; name all"),
        ("6", "4-6", r"--always_active and --always_skipped both name layer 6; take one of them"),
    ],
)
def test_refuses_what_names_no_gates(active: str | None, skipped: str | None, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}$"):
        asked_folding(active, skipped, GATES)


def test_forces_the_gates_that_it_folds() -> None:
    folding = Folding((GATES[0],), (GATES[2],))
    assert folding.kept([1.0, 2.0, 3.0], GATES) == [2.0]
    assert folding.thresholds([0.5, 0.4, 0.3], GATES) == [0.0, 0.4, 2.0]


def test_what_it_tells_can_be_read_again() -> None:
    told = Folding((GATES[0], GATES[2]), (GATES[1],)).metadata()
    assert told_layers(told, ALWAYS_ACTIVE) == {2, 3, 6}
    assert told_layers(told, ALWAYS_SKIPPED) == {4, 5}
    assert UNFOLDED.metadata() == {}
    assert told_layers({}, ALWAYS_ACTIVE) == frozenset()
