"""The options of an export."""

from dataclasses import dataclass, field
from typing import Literal

from modcompile.config import check_choice, check_threshold


@dataclass(frozen=True)
class ExportConfig:
    """How a folder is exported.

    Raises:
        ConfigError: the target or the verification is unknown, or the threshold negative, infinite or not a number.
    """

    target: Literal["ort", "onnx"] = field(
        default="ort",
        metadata={
            "help": "ort: fused operators that ONNX Runtime alone has, and a cache that is updated in place. onnx: "
            "operators of the ONNX standard."
        },
    )
    hard_threshold: float = field(
        default=0.5,
        metadata={"help": "A block is executed where a gate is above this; a session may override it at run time."},
    )
    emit_routing: bool = field(
        default=False,
        metadata={
            "help": "Add an output routing.{i} (bool [batch, sequence]) for every routed layer i, or precision.{i} "
            "(int64, the bits of each token) where layers choose precisions."
        },
    )

    verify: Literal["full", "none"] = field(
        default="full",
        metadata={
            "help": "full: run the model in PyTorch and in ONNX Runtime, and write it only if both agree. none: write "
            "it unproved, which takes a fraction of the time."
        },
    )

    def __post_init__(self) -> None:
        check_choice("verify", self.verify, ("full", "none"))
        check_choice("target", self.target, ("ort", "onnx"))
        check_threshold(self.hard_threshold)
