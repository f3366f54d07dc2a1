"""The options of an export."""

from dataclasses import dataclass, field, replace
from typing import Literal

from modcompile.calibrated_thresholds import check_hard_threshold, parse_threshold
from modcompile.config import check_choice
from modcompile.errors import ConfigError
from modcompile.export.unmasked_branch import MAX_BYTES, UnmaskedBranch
from modcompile.precision_config import GROUP_SIZES as TEXT_GROUP_SIZES
from modcompile.precision_config import RoundingMethod

GROUP_SIZES = (16, 32, 64, 128, 256)
"""What ONNX Runtime multiplies by on a CPU."""


@dataclass(frozen=True)
class WeightRounding:
    """To which codes weights are rounded."""

    num_bits: int
    group_size: int
    """Input features that share a scale."""
    symmetric: bool


INTEGER_WEIGHTS = {
    "int8": WeightRounding(8, group_size=64, symmetric=True),
    "int4": WeightRounding(4, group_size=32, symmetric=False),
}
"""How weights are rounded to nearest unless `group_size` says otherwise.

Perplexity of SmolLM2-135M-Instruct, embedding and head rounded as well, on 5,083 tokens of the built-in test split,
fp32 17.25, by group size::

                          32       64      128
    int8  symmetric     17.32    17.28    17.33
          asymmetric    17.29    17.27    17.30
    int4  symmetric     22.70    25.74    30.32
          asymmetric    22.13    25.15    25.14

Groups of 16 come to 22.37 at int4, and groups clipped by the least squared error of their weights to 23.58, 29.04 and
29.91. Of what int4 loses in groups of 32, embedding and head lose a third: at int8, they leave 20.70.
"""

FOR_A_TEXT = {
    "int8": WeightRounding(8, group_size=64, symmetric=True),
    "int4": WeightRounding(4, group_size=128, symmetric=True),
}
"""The same with a `rounding` of gptq, for what is multiplied by.

Perplexity of SmolLM2-135M-Instruct on 32 windows of 512 tokens, activations not rounded, int4, dense 17.11: blocks in
groups of 128, symmetric 18.65, with zero points 18.77 (the head with zero points in both); with the head rounded to
nearest in groups of 32 instead 19.78 and 20.01.
"""


@dataclass(frozen=True)
class ExportConfig:
    """How a folder is exported.

    Raises:
        ConfigError: an option is out of its range, or a group size is given for weights that have no groups.
    """

    target: Literal["ort", "onnx"] = field(
        default="ort",
        metadata={
            "help": "ort: fused operators that ONNX Runtime alone has, and a cache that is updated in place. onnx: "
            "operators of the ONNX standard."
        },
    )
    prefill: Literal["mask", "compact"] = field(
        default="compact",
        metadata={
            "help": "How a block that some tokens of a prompt need is executed. compact: the projections after "
            "attention and the MLP only for the tokens that need it. mask: for all tokens, and those that skip it keep "
            "what they had, which is about a hundredth faster where every token needs every block."
        },
    )
    unmasked_branch: UnmaskedBranch = field(
        default="auto",
        metadata={
            "help": "Whether routed blocks get a branch without masks and adapters for calls in which every token "
            "needs them, such as a step of one row: that is faster, and takes as many bytes of memory more as their "
            f"weights have. auto: where there are adapters, with integer weights of up to {MAX_BYTES // 2**20} MiB."
        },
    )
    hard_threshold: float | str = field(
        default=0.5,
        metadata={
            "parse": parse_threshold,
            "help": "A block is executed where a gate is above this; a session may override it at run time. auto: "
            "what modcompile.calibrate found first; auto:0.8: for that budget.",
        },
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
            "layers are then always executed). none: every gate keeps its If, as those of untrained routers always do."
        },
    )
    always_active: str | None = field(
        default=None,
        metadata={
            "help": "Layers, such as 0-3,7, to execute always, without their gates; all makes a dense artifact. Halves "
            "of layers (granularity) are 7.attn, 7.mlp. Of routed folders."
        },
    )
    always_skipped: str | None = field(
        default=None,
        metadata={
            "help": "Layers to skip always, named alike, of which only what makes keys and values is kept. Of routed "
            "folders."
        },
    )
    weights: Literal["fp32", "fp16", "int8", "int4"] = field(
        default="fp32",
        metadata={
            "help": "How weights are stored that nothing has quantized yet, embedding and head included: as they are, "
            "or rounded (see rounding). fp16 halves the files; a session computes in float32 all the same. What is "
            "lost is told."
        },
    )
    rounding: RoundingMethod = field(
        default="rtn",
        metadata={
            "help": "How weights become integers. rtn: to nearest. gptq: so that what blocks and head compute of a "
            "text, the built-in train split, changes least; at int4 that loses less in groups of 128, which are "
            "faster, than rtn in groups of 32, but needs a tokenizer and minutes."
        },
    )
    group_size: int | None = field(
        default=None,
        metadata={
            "help": "Input features that share a scale, 16, 32, 64, 128 or 256 (by default 64 for int8, for int4 32, "
            "and 128 by gptq, which takes 32, 64 and 128)."
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
        check_choice("fold_gates", self.fold_gates, ("auto", "none"))
        check_choice("prefill", self.prefill, ("mask", "compact"))
        check_choice("unmasked_branch", self.unmasked_branch, ("auto", "always", "never"))
        if self.unmasked_branch == "always" and self.target == "onnx":
            raise ConfigError("--unmasked_branch always is for --target ort: leave one of them out")
        check_hard_threshold(self.hard_threshold)
        check_choice("weights", self.weights, ("fp32", "fp16", *INTEGER_WEIGHTS))
        check_choice("rounding", self.rounding, ("rtn", "gptq"))
        integers = self.weights in INTEGER_WEIGHTS
        if self.rounding == "gptq" and not integers:
            raise ConfigError(f"--rounding gptq is for integer weights, and --weights is {self.weights}: leave it out")
        if self.group_size is not None:
            if not integers:
                raise ConfigError(f"--group_size is for integer weights, and --weights is {self.weights}: leave it out")
            known = GROUP_SIZES if self.rounding == "rtn" else TEXT_GROUP_SIZES
            if self.group_size not in known:
                by = " with --rounding gptq" if self.rounding == "gptq" else ""
                sizes = ", ".join(map(str, known))
                raise ConfigError(f"--group_size is {self.group_size}; it must be one of {sizes}{by}")

    @property
    def weight_rounding(self) -> WeightRounding | None:
        """How weights are rounded that are multiplied by, None where they are not."""
        return self._sized((INTEGER_WEIGHTS if self.rounding == "rtn" else FOR_A_TEXT).get(self.weights))

    @property
    def nearest_rounding(self) -> WeightRounding | None:
        """How those are rounded that a text says nothing about: what is only looked up, which no size makes faster."""
        return self._sized(INTEGER_WEIGHTS.get(self.weights))

    def _sized(self, rounding: WeightRounding | None) -> WeightRounding | None:
        if rounding is None or self.group_size is None:
            return rounding
        return replace(rounding, group_size=self.group_size)
