import dataclasses
import math
from typing import Any

import pytest

from modcompile.errors import ConfigError
from modcompile.export.export_config import GROUP_SIZES, ExportConfig


@pytest.mark.parametrize("threshold", [0.0, 0.5, 2.0])
def test_takes_thresholds_from_executing_all_to_skipping_all(threshold: float) -> None:
    assert ExportConfig(hard_threshold=threshold).hard_threshold == threshold


@pytest.mark.parametrize("threshold", [-0.1, math.nan, math.inf, -math.inf])
def test_refuses_what_is_no_threshold(threshold: float) -> None:
    with pytest.raises(ConfigError, match=r"^--hard_threshold is \S+; it must be a number, at least 0$"):
        ExportConfig(hard_threshold=threshold)


@pytest.mark.parametrize("option", ["target", "prefill", "unmasked_branch", "verify"])
def test_refuses_what_is_no_choice(option: str) -> None:
    choice: Any = {option: "some"}
    with pytest.raises(ConfigError, match=f"--{option} is 'some'"):
        ExportConfig(**choice)


def test_only_onnxruntime_gets_a_branch_without_masks() -> None:
    with pytest.raises(ConfigError, match=r"^--unmasked_branch always is for --target ort: leave one of them out$"):
        ExportConfig(target="onnx", unmasked_branch="always")
    assert ExportConfig(target="onnx").unmasked_branch == "auto"


def test_defaults_to_onnxruntime_a_half_and_no_outputs_of_ours() -> None:
    assert ExportConfig() == ExportConfig(
        target="ort", hard_threshold=0.5, emit_routing=False, weights="fp32", group_size=None, prefill="compact"
    )
    assert ExportConfig().weight_rounding is None


@pytest.mark.parametrize(("weights", "bits"), [("int8", 8), ("int4", 4)])
@pytest.mark.parametrize("group_size", [16, 32, 64, 128, 256])
def test_rounds_in_groups_of_the_size_asked_for(weights: Any, bits: int, group_size: int) -> None:
    default, asked = (
        ExportConfig(weights=weights).weight_rounding,
        ExportConfig(weights=weights, group_size=group_size).weight_rounding,
    )
    assert default is not None and default.num_bits == bits and default.group_size in GROUP_SIZES
    assert asked == dataclasses.replace(default, group_size=group_size)


@pytest.mark.parametrize("group_size", [0, -32, 8, 48, 512])
def test_refuses_groups_that_onnx_runtime_has_not(group_size: int) -> None:
    with pytest.raises(ConfigError, match=r"^--group_size is \S+; it must be one of 16, 32, 64, 128, 256$"):
        ExportConfig(weights="int8", group_size=group_size)


def test_refuses_groups_of_weights_that_have_none() -> None:
    with pytest.raises(
        ConfigError, match=r"^--group_size is for integer weights, and --weights is fp32: leave it out$"
    ):
        ExportConfig(group_size=32)


@pytest.mark.parametrize("group_size", [16, 256])
def test_refuses_groups_that_no_text_rounds(group_size: int) -> None:
    with pytest.raises(ConfigError, match=r"^--group_size is \d+; it must be one of 32, 64, 128 with --rounding gptq$"):
        ExportConfig(weights="int4", rounding="gptq", group_size=group_size)


@pytest.mark.parametrize("weights", ["fp32", "fp16"])
def test_refuses_to_round_for_a_text_what_stays_as_it_is(weights: Any) -> None:
    with pytest.raises(
        ConfigError, match=rf"^--rounding gptq is for integer weights, and --weights is {weights}: leave it out$"
    ):
        ExportConfig(weights=weights, rounding="gptq")


def test_refuses_another_rounding() -> None:
    rounding: Any = "up"
    with pytest.raises(ConfigError, match=r"^--rounding is 'up'; it must be one of rtn, gptq$"):
        ExportConfig(weights="int4", rounding=rounding)


def test_what_is_only_looked_up_stays_in_small_groups_unless_told() -> None:
    """By the text, what is multiplied by has the larger groups, which are faster."""
    by_text = ExportConfig(weights="int4", rounding="gptq")
    nearest = ExportConfig(weights="int4").weight_rounding
    assert by_text.nearest_rounding == nearest is not None
    assert by_text.weight_rounding is not None and by_text.weight_rounding.group_size > nearest.group_size
    told = ExportConfig(weights="int4", rounding="gptq", group_size=64)
    assert told.nearest_rounding is not None and told.weight_rounding is not None
    assert told.nearest_rounding.group_size == told.weight_rounding.group_size == 64


def test_refuses_other_weights() -> None:
    weights: Any = "int3"
    with pytest.raises(ConfigError, match=r"^--weights is 'int3'; it must be one of fp32, fp16, int8, int4$"):
        ExportConfig(weights=weights)


def test_refuses_what_is_no_way_to_fold() -> None:
    config: Any = {"fold_gates": "some"}
    with pytest.raises(ConfigError, match=r"^--fold_gates is 'some'; it must be one of auto, none$"):
        ExportConfig(**config)


def test_every_option_explains_itself_and_none_can_be_changed() -> None:
    assert all(field.metadata["help"] for field in dataclasses.fields(ExportConfig))
    config: Any = ExportConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.hard_threshold = 1.0
