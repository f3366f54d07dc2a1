"""The options of what depth gates learn from."""

from dataclasses import dataclass, field

from modcompile.config import check
from modcompile.errors import ConfigError


@dataclass(frozen=True)
class LossConfig:
    """What depth gates learn from besides their budget, and how hard they end.

    Raises:
        ConfigError: an option is outside of its range, or there is nothing to learn from.
    """

    lm_weight: float = field(default=1.0, metadata={"help": "Weight of the LM loss, where no precisions are trained."})
    distill_weight: float = field(
        default=0.0,
        metadata={
            "help": "Weight of the KL divergence from the dense model's predictions to those of the routed model, in "
            "nats a token. Above 0, a step has one more forward pass, of the dense model."
        },
    )
    gate_temperature: float = field(
        default=1.0,
        metadata={
            "help": "What router logits are divided by at the end of a training; it falls from 1 by equal factors. "
            "Below 1, soft gates end harder than they began."
        },
    )

    def __post_init__(self) -> None:
        check("gate_temperature", self.gate_temperature, above=0, at_most=1)
        check("lm_weight", self.lm_weight, at_least=0)
        check("distill_weight", self.distill_weight, at_least=0)
        if not self.lm_weight and not self.distill_weight:
            raise ConfigError("--lm_weight and --distill_weight are both 0: there is nothing left to learn from")
