import re

import numpy as np
import pytest

from modcompile.errors import ConfigError
from modcompile.export.overrides import BIAS_INPUT, THRESHOLD_INPUT, Overrides


@pytest.fixture
def overrides() -> Overrides:
    """Of two depth gates and three layers that choose among three precisions."""
    return Overrides({THRESHOLD_INPUT: [2], BIAS_INPUT: [3, 3], "logits_to_keep": [1]})


def test_shapes_are_those_of_the_inputs(overrides: Overrides) -> None:
    assert (overrides.num_thresholds, overrides.bias_shape) == (2, (3, 3))
    none = Overrides({"logits_to_keep": [1]})
    assert (none.num_thresholds, none.bias_shape) == (0, (0, 0))


def test_feeds_what_was_set(overrides: Overrides) -> None:
    assert overrides.overriding == {}
    overrides.thresholds = 0.5
    overrides.set_precision_bias([0, 1, 2])
    assert overrides.thresholds == (0.5, 0.5)
    fed = overrides.overriding
    assert [array.dtype for array in fed.values()] == [np.float32, np.float32]
    np.testing.assert_array_equal(fed[THRESHOLD_INPUT], [0.5, 0.5])
    np.testing.assert_array_equal(fed[BIAS_INPUT], [[0, 1, 2]] * 3)
    overrides.thresholds = None
    assert list(overrides.overriding) == [BIAS_INPUT]
    overrides.set_precision_bias(None)
    assert overrides.overriding == {}
    assert list(fed) == [THRESHOLD_INPUT, BIAS_INPUT]


def test_what_was_fed_does_not_change_with_the_callers_array(overrides: Overrides) -> None:
    bias = np.zeros((3, 3), np.float32)
    overrides.set_precision_bias(bias)
    bias += 1
    assert not overrides.overriding[BIAS_INPUT].any()


@pytest.mark.parametrize("thresholds", [-0.1, float("nan"), float("inf"), [0.5], [0.5, 0.5, 0.5], [0.5, -1.0]])
def test_rejects_thresholds_and_keeps_those_before(overrides: Overrides, thresholds: float | list[float]) -> None:
    overrides.thresholds = 0.25
    fed = overrides.overriding
    with pytest.raises(ConfigError, match="threshold"):
        overrides.thresholds = thresholds
    assert overrides.thresholds == (0.25, 0.25)
    assert overrides.overriding is fed


def test_thresholds_without_gates() -> None:
    """One for all of none is none; one each is too many."""
    none = Overrides({})
    none.thresholds = 0.5
    assert none.overriding == {}
    with pytest.raises(ConfigError, match="1 thresholds for 0 gates"):
        none.thresholds = [0.5]


@pytest.mark.parametrize(
    ("bias", "message"),
    [
        ([0.0, 1.0], "a precision bias must be numbers of shape (3, 3)"),
        (np.zeros((2, 3)), "a precision bias must be numbers of shape (3, 3)"),
        (np.zeros((1, 3, 3)), "a precision bias must be numbers of shape (3, 3)"),
        ([[0.0], [0.0, 1.0]], "a precision bias must be numbers of shape (3, 3)"),
        ("high", "a precision bias must be numbers of shape (3, 3)"),
        ([0.0, np.nan, 0.0], "a precision bias holds NaN"),
    ],
)
def test_rejects_a_bias_and_keeps_the_one_before(overrides: Overrides, bias: object, message: str) -> None:
    overrides.set_precision_bias([0, 1e4, 0])
    with pytest.raises(ConfigError, match=re.escape(message)):
        overrides.set_precision_bias(bias)
    np.testing.assert_array_equal(overrides.overriding[BIAS_INPUT], [[0, 1e4, 0]] * 3)


@pytest.mark.parametrize("bias", [0.0, [0.0], [0.0, 1.0]])
def test_a_bias_needs_a_choice_of_precisions(bias: object) -> None:
    gates_only = Overrides({THRESHOLD_INPUT: [2]})
    with pytest.raises(ConfigError, match="that does not choose precisions; leave it out"):
        gates_only.set_precision_bias(bias)
    gates_only.set_precision_bias(None)
    assert gates_only.overriding == {}
