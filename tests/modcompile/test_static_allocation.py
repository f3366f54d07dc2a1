from itertools import pairwise, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modcompile.static_allocation import Sensitivity, allocation_at, greedy_allocations, measure_sensitivity

PRECISIONS = (2, 4, 8, 16)


@st.composite
def sensitivities(draw: st.DrawFn, *, least: int = -20) -> Sensitivity:
    """Of up to four layers; whole numbers, so that sums are exact."""
    precisions = sorted(draw(st.sets(st.sampled_from(PRECISIONS), min_size=1)), reverse=True)
    increase = st.integers(least, 100).map(float)
    return [
        {precisions[0]: 0.0} | {bits: draw(increase) for bits in precisions[1:]} for _ in range(draw(st.integers(1, 4)))
    ]


def _cost(sensitivity: Sensitivity, allocation: tuple[int, ...]) -> float:
    return sum(by_bits[bits] for by_bits, bits in zip(sensitivity, allocation, strict=True))


def test_sensitivity_lowers_one_layer_at_a_time() -> None:
    seen = []

    def loss_of(allocation: list[int]) -> float:
        seen.append(tuple(allocation))
        return 3.0 + sum((16 - bits) * 10**layer for layer, bits in enumerate(allocation))

    sensitivity = measure_sensitivity(loss_of, 3, [4, 8, 16])
    assert sensitivity == [{16: 0.0, 8: 8.0 * 10**layer, 4: 12.0 * 10**layer} for layer in range(3)]
    assert seen == [(16, 16, 16), (8, 16, 16), (4, 16, 16), (16, 8, 16), (16, 4, 16), (16, 16, 8), (16, 16, 4)]


def test_steps_are_those_of_the_least_increase_per_bit() -> None:
    sensitivity = [{16: 0.0, 8: 8.0, 4: 20.0}, {16: 0.0, 8: 4.0, 4: 12.0}]
    assert greedy_allocations(sensitivity) == [(16, 16), (16, 8), (8, 8), (8, 4), (4, 4)]


def test_a_precision_that_costs_more_than_the_way_past_it_is_jumped_over() -> None:
    sensitivity = [{16: 0.0, 8: 10.0, 4: 11.0}, {16: 0.0, 8: 4.0, 4: 100.0}]
    assert greedy_allocations(sensitivity) == [(16, 16), (16, 8), (4, 8), (4, 4)]


def test_a_layer_that_gains_from_fewer_bits_comes_first() -> None:
    assert greedy_allocations([{16: 0.0, 4: 1.0}, {16: 0.0, 4: -1.0}]) == [(16, 16), (16, 4), (4, 4)]


def test_one_precision_leaves_nothing_to_choose() -> None:
    assert measure_sensitivity(lambda _: 1.0, 2, [8]) == [{8: 0.0}, {8: 0.0}]
    assert greedy_allocations([{8: 0.0}, {8: 0.0}]) == [(8, 8)]


@given(sensitivities())
def test_walks_down_one_layer_at_a_time(sensitivity: Sensitivity) -> None:
    allocations = greedy_allocations(sensitivity)
    assert allocations[0] == tuple(max(by_bits) for by_bits in sensitivity)
    assert allocations[-1] == tuple(min(by_bits) for by_bits in sensitivity)
    for before, after in pairwise(allocations):
        assert [new < old for old, new in zip(before, after, strict=True) if new != old] == [True]


@given(sensitivities())
def test_no_allocation_of_as_many_bits_costs_less(sensitivity: Sensitivity) -> None:
    for allocation in greedy_allocations(sensitivity):
        rivals = (rival for rival in product(*sensitivity) if sum(rival) == sum(allocation))
        assert _cost(sensitivity, allocation) == pytest.approx(min(_cost(sensitivity, rival) for rival in rivals))


@given(sensitivities(least=0))
def test_no_allocation_of_fewer_bits_costs_less_where_bits_never_harm(sensitivity: Sensitivity) -> None:
    for allocation in greedy_allocations(sensitivity):
        rivals = (rival for rival in product(*sensitivity) if sum(rival) <= sum(allocation))
        assert _cost(sensitivity, allocation) == pytest.approx(min(_cost(sensitivity, rival) for rival in rivals))


@given(sensitivities(), st.floats(0, 20))
def test_takes_the_most_bits_within_the_average(sensitivity: Sensitivity, average: float) -> None:
    allocations = greedy_allocations(sensitivity)
    found = allocation_at(allocations, average)
    within = [bits for bits in allocations if sum(bits) / len(bits) <= average + 1e-6]
    assert found == (within[0] if within else None)


def test_an_average_that_rounding_lowered_is_still_reached() -> None:
    allocations = [(16, 16, 16), (16, 8, 4), (4, 4, 4)]
    assert allocation_at(allocations, 28 / 3 - 1e-12) == (16, 8, 4)
    assert allocation_at(allocations, 9.3) == (4, 4, 4)
    assert allocation_at(allocations, 3.9) is None
