"""The options of weights at several precisions, and of the routers that choose from them."""

from dataclasses import dataclass, field
from typing import Literal

from modcompile.config import check, check_choice
from modcompile.errors import ConfigError

RoundingMethod = Literal["rtn", "gptq"]
RouterScope = Literal["sequence", "token"]
PrecisionMixing = Literal["soft", "straight_through", "sampled"]

DEFAULT_METHOD: RoundingMethod = "gptq"
"""How weights are rounded unless `method` says otherwise.

Perplexity of SmolLM2-135M-Instruct on nine windows of the built-in test split, dense 16.55, symmetric groups of 64,
nested; mse stands for a clip of each group by the least squared error of its weights, which was given up::

               4 + 8 bits           2 + 4 + 8 bits
    rtn        20.29   16.50        27619    26.03   16.62
    mse        22.24   16.70        76705    28.29   16.84
    gptq       17.57   16.54           91    21.15   16.65

(2 + 4 + 8 bits with scales that clip at all bits; since only two bits clip, `modcompile.evaluate` gives 90.8, 21.47 and
17.22 on all of the split, where dense is 17.25.) Clipped at all bits, GPTQ comes to 18.16 and 16.61 at 4 + 8 bits; not
at all, and with a tenth of the damping, to 227, 27.98 and 16.90 at 2 + 4 + 8; and where besides all tokens weigh the
same, to 19.97 and 16.64 at 4 + 8 bits.
"""

GROUP_SIZES = (32, 64, 128)
"""Input features that may share a scale."""

PRECISIONS = (2, 4, 8, 16)
"""Bits that a weight can have; 16 stands for the original weight."""


@dataclass(frozen=True)
class RoundingConfig:
    """How weights are quantized.

    Raises:
        ConfigError: an option is outside of its range.
    """

    group_size: int = field(
        default=64, metadata={"help": "Input features that share a scale: 32, 64 or 128; fewer are better and slower."}
    )
    symmetric: bool = field(
        default=True,
        metadata={
            "help": "Put zero in the middle of the codes; otherwise every group has a zero point.",
            "negated": "--asymmetric",
        },
    )
    method: RoundingMethod = field(
        default=DEFAULT_METHOD,
        metadata={
            "help": "rtn: round to nearest. gptq: round so that what blocks compute of a text, the built-in train "
            "split, changes least; needs a tokenizer and minutes."
        },
    )
    weight_sharing: Literal["nested", "separate"] = field(
        default="nested",
        metadata={
            "help": "nested: each precision adds a part to the one below, so that 4 and 8 bits take 8 bits a weight. "
            "separate: each is stored on its own."
        },
    )
    calibration_samples: int = field(
        default=16, metadata={"help": "Sequences of the text that gptq rounds for; more are better and slower."}
    )
    calibration_length: int = field(
        default=512, metadata={"help": "Tokens in each of them, or the model's positions where these are fewer."}
    )

    def __post_init__(self) -> None:
        if self.group_size not in GROUP_SIZES:
            raise ConfigError(f"--group_size is {self.group_size}; it must be 32, 64 or 128")
        check_choice("method", self.method, ("rtn", "gptq"))
        check_choice("weight_sharing", self.weight_sharing, ("nested", "separate"))
        check("calibration_samples", self.calibration_samples, at_least=1)
        check("calibration_length", self.calibration_length, at_least=2)


@dataclass(frozen=True)
class QuantizationConfig(RoundingConfig):
    """To which precisions weights are quantized, and how; stored beside them.

    Raises:
        ConfigError: an option is outside of its range.
    """

    precisions: list[int] = field(
        default_factory=lambda: [4, 8, 16],
        metadata={"help": "Bits of the weights inside of blocks: any of 2, 4, 8 and 16 (16: the original weights)."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        given = " ".join(map(str, self.precisions))
        if not self.precisions or any(precision not in PRECISIONS for precision in self.precisions):
            raise ConfigError(f"--precisions is {given!r}; it must be some of {', '.join(map(str, PRECISIONS))}")
        if len(set(self.precisions)) != len(self.precisions):
            raise ConfigError(f"--precisions is {given!r}; each may be given once")
        object.__setattr__(self, "precisions", sorted(self.precisions))

    @property
    def needs_calibration(self) -> bool:
        """Whether weights are rounded for a text; 16 bits alone are not rounded."""
        return self.method == "gptq" and self.precisions[0] < 16


@dataclass(frozen=True)
class PrecisionBudgetConfig:
    """How many bits blocks are to use, and how hard training pushes for it.

    Raises:
        ConfigError: an option is outside of its range.
    """

    precision_weight: float = field(
        default=0.01,
        metadata={"help": "Weight of the bits loss: the average bits of a block as a share of the most it can have."},
    )
    ce_weight: float = field(default=1.0, metadata={"help": "Weight of the LM loss, where precisions are trained."})
    avg_bits_target: float | None = field(
        default=None, metadata={"help": "Charge only the average bits above this. By default all are charged."}
    )
    static_start_samples: int = field(
        default=8,
        metadata={
            "help": "With --avg_bits_target, new routers start from the best allocation of bits that is the same for "
            "all inputs; it is measured on this many sequences of the training data. 0: they start from the most bits."
        },
    )

    def __post_init__(self) -> None:
        check("precision_weight", self.precision_weight, at_least=0)
        check("ce_weight", self.ce_weight, at_least=0)
        if self.avg_bits_target is not None:
            check("avg_bits_target", self.avg_bits_target, at_least=0, at_most=16)
        check("static_start_samples", self.static_start_samples, at_least=0)


@dataclass(frozen=True)
class PrecisionRoutingConfig:
    """For what a precision is chosen, and how the choice is trained.

    Raises:
        ConfigError: an option is outside of its range.
    """

    router_scope: RouterScope = field(
        default="sequence",
        metadata={
            "help": "sequence: one precision for all tokens of a call (of a batch, the highest that a row asks for). "
            "token: each token's block is computed at the precision that it chose."
        },
    )
    precision_mixing: PrecisionMixing = field(
        default="soft",
        metadata={
            "help": "What a training step computes. soft: all precisions, mixed by the router's weights. "
            "straight_through: all, of which the chosen one counts. sampled: one of each block, drawn by the weights."
        },
    )

    def __post_init__(self) -> None:
        check_choice("router_scope", self.router_scope, ("sequence", "token"))
        check_choice("precision_mixing", self.precision_mixing, ("soft", "straight_through", "sampled"))


@dataclass(frozen=True)
class PrecisionRouterConfig(PrecisionRoutingConfig):
    """By what each block's precision is chosen, and how that is trained; stored beside the routers.

    Raises:
        ConfigError: an option is outside of its range.
    """

    router_dropout: float = field(
        default=0.0, metadata={"help": "Dropout on the hidden layers of a precision router while training."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check("router_dropout", self.router_dropout, at_least=0, below=1)
