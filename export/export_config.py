"""The options of an export."""

from dataclasses import dataclass, field
from typing import Literal

from modcompile.config import check_choice, check_threshold


@dataclass(frozen=True)
class ExportConfig:
    """How a folder is exported.

    Raises:
        ConfigError: the target or the prefill is unknown, or the threshold negative, infinite or not a number.
    """

    target: Literal["ort", "onnx"] = field(
        default="ort",
        metadata={
            "help": "ort: fused operators that ONNX Runtime alone has, and a cache that is updated in place. onnx: "
            "operators of the ONNX standard."
        },
    )
    prefill: Literal["mask", "compact"] = field(
        default="mask",
        metadata={
            "help": "How a block that some tokens of a prompt need is executed. mask: for all tokens, and those that "
            "skip it keep what they had. compact: the projections after attention and the MLP only for the tokens that "
            "need it; a decode step is then a little slower."
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

    def __post_init__(self) -> None:
        check_choice("target", self.target, ("ort", "onnx"))
        check_choice("prefill", self.prefill, ("mask", "compact"))
        check_threshold(self.hard_threshold)
