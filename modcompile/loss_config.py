"""The options of what depth gates learn from."""

from dataclasses import dataclass, field
from typing import Literal

from modcompile.config import RouterConfig, check, check_choice
from modcompile.errors import ConfigError

GateGradient = Literal["first_order", "second_order"]


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

    gate_gradient: GateGradient = field(
        default="first_order",
        metadata={
            "help": "What straight-through gates learn from. first_order: the slope of the loss where they are. "
            "second_order: what opening or closing them changes, as the loss bends in between; a step has one more "
            "backward pass."
        },
    )

    def __post_init__(self) -> None:
        check_choice("gate_gradient", self.gate_gradient, ("first_order", "second_order"))
        check("gate_temperature", self.gate_temperature, above=0, at_most=1)
        check("lm_weight", self.lm_weight, at_least=0)
        check("distill_weight", self.distill_weight, at_least=0)
        if not self.lm_weight and not self.distill_weight:
            raise ConfigError("--lm_weight and --distill_weight are both 0: there is nothing left to learn from")

    def check_fits(self, router: RouterConfig, *, is_static: bool) -> None:
        """Refuse gates that can't learn as they are to.

        Raises:
            ConfigError: a gradient of the second order is wanted, and gates are not straight-through, or do not learn.
        """
        if self.gate_gradient != "second_order":
            return
        if router.gate != "straight_through":
            raise ConfigError(
                f"--gate_gradient second_order is for gates that are 0 or 1 in training, and --gate is {router.gate}; "
                "make it straight_through, or leave --gate_gradient out"
            )
        if is_static:
            raise ConfigError(
                "--gate_gradient is for gates that learn, and those of --static_selection_samples do not; leave it out"
            )
