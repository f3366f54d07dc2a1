import math

import pytest

from benchmarks.quality.figures import Point, perplexity_at, share_of_loss, told

POINTS = [Point(0.6, 4.0), Point(0.8, 2.0)]


@pytest.mark.parametrize(
    ("work", "perplexity"),
    [(1.0, 1.0), (0.9, math.sqrt(2)), (0.8, 2.0), (0.75, 2 * 2**0.25), (0.6, 4.0), (0.596, 4 * 2**0.02), (0.594, None)],
)
def test_perplexity_lies_on_lines_in_its_logarithm(work: float, perplexity: float | None) -> None:
    for points in (POINTS, POINTS[::-1]):
        assert perplexity_at(points, work) == pytest.approx(perplexity)


def test_points_of_the_same_work_are_no_division_by_zero() -> None:
    assert perplexity_at([Point(0.8, 2.0), Point(0.8, 3.0)], 0.8) in (2.0, 3.0)
    assert perplexity_at([Point(1.0, 1.5)], 1.0) in (1.0, 1.5)


def test_share_of_loss_is_of_nats() -> None:
    assert share_of_loss(2.0, 4.0) == pytest.approx(0.5)
    assert share_of_loss(1.0, 4.0) == 0
    assert share_of_loss(None, 4.0) is share_of_loss(2.0, None) is None
    assert share_of_loss(2.0, 1.0) is None


def test_tells_the_median_and_the_range() -> None:
    assert told([1.0, 3.0, 2.0]) == "2.00 (1.00 to 3.00)"
    assert told([1.234]) == told([None, 1.234]) == "1.23"
    assert told([]) == told([None]) == "-"
