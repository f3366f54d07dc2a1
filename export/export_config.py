"""The options of an export."""

from dataclasses import dataclass, field
from typing import Literal

from modcompile.config import check_choice, check_threshold


@dataclass(frozen=True)
class ExportConfig:
    """How a folder is exported.

    Raises:
        ConfigError: the target or the folding is unknown, or the threshold negative, infinite or not a number.
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
    fold_gates: Literal["auto", "none"] = field(
        default="auto",
        metadata={
            "help": "auto: gates that are always open or always closed on some text are decided once and for all, and "
            "so are those that skip too rarely to pay for their router and If on this machine, decoding one row (their "
            "layers are then always executed). none: every gate keeps its If. Of routed folders."
        },
    )
    always_active: str | None = field(
        default=None,
        metadata={"help": "Layers, such as 0-3,7, to execute always, without their gates. Of routed folders."},
    )
    always_skipped: str | None = field(
        default=None,
        metadata={"help": "Layers to skip always, of which only what makes keys and values is kept."},
    )

    def __post_init__(self) -> None:
        check_choice("target", self.target, ("ort", "onnx"))
        check_choice("fold_gates", self.fold_gates, ("auto", "none"))
        check_threshold(self.hard_threshold)
