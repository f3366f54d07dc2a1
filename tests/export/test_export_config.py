import dataclasses
import math
from typing import Any

import pytest

from modcompile.errors import ConfigError
from modcompile.export.export_config import ExportConfig


@pytest.mark.parametrize("threshold", [0.0, 0.5, 2.0])
def test_takes_thresholds_from_executing_all_to_skipping_all(threshold: float) -> None:
    assert ExportConfig(hard_threshold=threshold).hard_threshold == threshold


@pytest.mark.parametrize("threshold", [-0.1, math.nan, math.inf, -math.inf])
def test_refuses_what_is_no_threshold(threshold: float) -> None:
    with pytest.raises(ConfigError, match=r"^--hard_threshold is \S+; it must be a number, at least 0$"):
        ExportConfig(hard_threshold=threshold)


def test_refuses_an_unknown_prefill() -> None:
    config: Any = {"prefill": "sparse"}
    with pytest.raises(ConfigError, match=r"^--prefill is 'sparse'; "):
        ExportConfig(**config)


def test_defaults_to_a_half_and_to_no_outputs_of_ours() -> None:
    assert ExportConfig() == ExportConfig(target="ort", prefill="mask", hard_threshold=0.5, emit_routing=False)


def test_every_option_explains_itself_and_none_can_be_changed() -> None:
    assert all(field.metadata["help"] for field in dataclasses.fields(ExportConfig))
    config: Any = ExportConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.hard_threshold = 1.0
