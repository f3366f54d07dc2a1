import json
import math
from importlib.metadata import version

import pytest

from modcompile.export.verification import (
    MAX_LOGIT_DIFFERENCE,
    MIN_EQUAL_ROUTES,
    NOT_VERIFIED,
    Verification,
    versions,
)
from modcompile.version import __version__


def failures(result: Verification) -> list[str]:
    result.judge()
    assert result.passed is (not result.failures)
    return result.failures


def test_the_bounds_are_those_promised() -> None:
    assert MAX_LOGIT_DIFFERENCE == 1e-3
    assert MIN_EQUAL_ROUTES == 0.999


def test_passes_within_bounds() -> None:
    assert failures(Verification(cases={"all skipped": 1e-3}, equal_routes=0.999)) == []


@pytest.mark.parametrize("difference", [1.1e-3, math.inf, math.nan])
def test_fails_where_logits_differ(difference: float) -> None:
    (failure,) = failures(Verification(cases={"all skipped": 1e-6, "all executed": difference}))
    assert failure == f"logits differ by {difference:.2g}, more than 0.001 (all executed)"


@pytest.mark.parametrize(
    ("torch_error", "onnx_error", "passes"),
    [(1e-3, 4e-3, True), (1e-3, 4.1e-3, False), (0.0, 1e-3, False), (math.nan, 1e-3, False), (1e-3, math.inf, False)],
)
def test_where_they_differ_the_artifact_may_be_as_wrong_as_pytorch(
    torch_error: float, onnx_error: float, passes: bool
) -> None:
    errors = {"all executed": {"torch": torch_error, "onnx": onnx_error}}
    result = Verification(cases={"all skipped": 1e-6, "all executed": 2e-3}, errors_to_double=errors)
    assert result.cases_out_of_bounds == ["all executed"]
    assert (failures(result) == []) is passes


@pytest.mark.parametrize("share", [0.9989, 0.0, math.nan])
def test_fails_where_routes_differ(share: float) -> None:
    assert failures(Verification(equal_routes=share)) == [f"only {share:.4%} of the routes are equal, less than 99.9%"]


@pytest.mark.parametrize(
    ("change", "noise", "bound"),
    [
        (0.004, 0.0, None),
        (0.006, 0.0, "0.5%"),
        (0.006, 0.001, None),
        (0.009, 0.001, "0.8%"),
        (0.034, 0.02, None),
        (-0.06, 0.5, "3.5%"),
        (math.inf, 0.01, "3.5%"),
        (math.nan, 0.0, "0.5%"),
        (0.0, math.nan, "nan%"),
    ],
)
def test_fails_where_the_perplexity_differs_by_more_than_chance(change: float, noise: float, bound: str | None) -> None:
    measured = {"torch": 20.0, "onnx": 20.0 * (1 + change)}
    found = failures(Verification(perplexity_rounded=measured, perplexity_noise=noise))
    expected = f"the perplexity differs by {abs(change):.2%}, more than {bound} (own decisions, row by row)"
    assert found == ([] if bound is None else [expected])


def test_fails_where_an_if_was_seen_from_one_side_only() -> None:
    assert failures(Verification(never_seen={3: ["executed"], 4: ["executed"], 5: ["skipped"]})) == [
        "the If of layer 3 was never seen executed",
        "the If of layer 5 was never seen skipped",
    ]


def test_tells_everything_that_failed() -> None:
    everything = Verification(cases={"own": 1.0}, equal_routes=0.5, never_seen={0: ["executed", "skipped"]})
    assert len(failures(everything)) == 4


def test_json_holds_what_was_found() -> None:
    result = Verification(max_logit_difference=1e-6, cases={"all skipped": 1e-6}, versions=versions())
    result.judge()
    data = json.loads(json.dumps(result.as_json()))
    assert data["passed"] is True
    assert data["bounds"] == {
        "max_logit_difference": 1e-3,
        "or_error_to_double_relative_to_torch": 4.0,
        "equal_routes": 0.999,
        "perplexity_change": 0.005,
        "and_standard_errors": 3.0,
        "and_at_most": 0.03,
        "forced_perplexity_change": 0.05,
    }
    assert {"max_logit_difference", "equal_routes", "perplexity_torch", "perplexity_onnx", "active_ratio"} < data.keys()
    result.failures.append("something")
    assert result.as_json()["passed"] is False


def test_what_was_skipped_has_not_passed_and_says_so() -> None:
    result = Verification(skipped=True, versions=versions())
    assert not result.passed
    assert result.as_json() == {
        "passed": False,
        "skipped": True,
        "result": NOT_VERIFIED,
        "versions": versions(),
    }
    assert NOT_VERIFIED.startswith("not verified: ")


def test_tells_the_versions_of_what_took_part() -> None:
    installed = {name: version(name) for name in ("onnx", "onnxruntime", "transformers")}
    told = versions()
    assert told.pop("torch").startswith(version("torch").partition("+")[0])
    assert told == {"modcompile": __version__, **installed}
