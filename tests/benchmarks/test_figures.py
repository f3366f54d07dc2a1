import pytest

from benchmarks.peers.figures import quartiles, ratios_to, spread_of

ROUNDS = {
    "mine": [{"decode": 20.0, "decode_context": 3.0}, {"decode": 44.0, "decode_context": 4.0}],
    "theirs": [{"decode": 10.0}, {"decode": 40.0}],
}


def test_quartiles_stay_within_the_values() -> None:
    assert quartiles([4.0, 1.0, 2.0, 3.0, 5.0]) == (2.0, 3.0, 4.0)
    assert quartiles([1.0, 3.0]) == (1.5, 2.0, 2.5)
    assert quartiles([7.0]) == (7.0, 7.0, 7.0)


def test_spread_leaves_out_cases_without_the_figure() -> None:
    assert spread_of(ROUNDS, "decode_context") == {"mine": (3.25, 3.5, 3.75)}


def test_ratios_are_taken_within_a_round() -> None:
    # 2.0 and 1.1; the ratio of the medians, 32 to 25, is another.
    ratios = ratios_to(ROUNDS, "decode", "theirs")
    assert ratios["mine"] == pytest.approx((1.325, 1.55, 1.775))
    assert ratios["theirs"] == (1.0, 1.0, 1.0)
