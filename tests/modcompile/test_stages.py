from collections.abc import Mapping
from typing import Any

import pytest

from modcompile.stages import Profile, ProfileConfig, profiled, stage

MIB = 2**20


@stage("squaring")
def squared(number: int) -> int:
    return number * number


def test_tells_of_every_stage_once_in_the_order_in_which_they_began(capsys: pytest.CaptureFixture[str]) -> None:
    kept: list[Mapping[str, Any]] = []
    with profiled(ProfileConfig(profile=True), kept.append):
        with stage("outer"):
            assert [squared(2), squared(3)] == [4, 9]
        with stage("other"):
            pass
    (costs,) = kept
    names = ["importing", "the rest", "outer", "squaring", "other"]
    assert list(costs) == names
    captured = capsys.readouterr()
    assert captured.out == ""
    header, *rows = captured.err.splitlines()
    assert header.split() == ["stage", "s", "CPU", "s", "peak", "MiB"]
    assert [row.startswith(name) for row, name in zip(rows, [*names, "all"], strict=True)] == [True] * 6


def test_an_inner_stage_is_not_counted_for_the_outer_one() -> None:
    profile = Profile()
    profile.begin("outer")
    profile.begin("inner")
    sum(range(1_000_000))
    profile.end()
    profile.end()
    assert profile.costs["inner"].cpu_seconds > 10 * profile.costs["outer"].cpu_seconds


def test_the_peak_is_what_the_process_has_held_at_most() -> None:
    profile = Profile()
    for name, size in (("little", 1), ("much", 300), ("little again", 1)):
        profile.begin(name)
        held = b"x" * (size * MIB)
        del held
        profile.end()
    little, much, again = (cost.peak_mib for cost in profile.costs.values())
    assert little is not None and much is not None
    assert again == much >= max(little, 300)
    assert "much" in profile.table()


def test_a_process_began_before_its_first_stage() -> None:
    kept: list[Mapping[str, Any]] = []
    with profiled(ProfileConfig(profile=True), kept.append):
        pass
    importing = kept[0]["importing"]
    assert importing["cpu_seconds"] > 0
    assert 0 < importing["seconds"] < 24 * 3600


def test_nothing_is_told_unless_it_is_asked_for_and_the_command_succeeds(capsys: pytest.CaptureFixture[str]) -> None:
    kept: list[Mapping[str, Any]] = []
    with profiled(ProfileConfig(), kept.append):
        assert squared(4) == 16
    with pytest.raises(RuntimeError, match="half-way"), profiled(ProfileConfig(profile=True), kept.append):
        raise RuntimeError("half-way")
    assert squared(5) == 25
    assert not kept
    assert capsys.readouterr().err == ""
