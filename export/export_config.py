"""The options of an export."""

from dataclasses import dataclass, field

from modcompile.config import check_threshold


@dataclass(frozen=True)
class ExportConfig:
    """How a folder is exported.

    Raises:
        ConfigError: the threshold is negative, infinite or not a number.
    """

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
        check_threshold(self.hard_threshold)
