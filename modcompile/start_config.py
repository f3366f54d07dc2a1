"""The options of what a training of depth gates starts from."""

from dataclasses import dataclass, field

from modcompile.config import RouterConfig, check
from modcompile.errors import ConfigError


@dataclass(frozen=True)
class StartConfig:
    """What adapters and routers start from.

    Raises:
        ConfigError: an option is outside of its range, or two exclude each other.
    """

    adapter_start_samples: int = field(
        default=32,
        metadata={
            "help": "Let new adapters of low rank start as the best linear stand-ins for their blocks, found by least "
            "squares on this many sequences of the training data. 0: they start as the identity."
        },
    )
    router_start_samples: int = field(
        default=0,
        metadata={
            "help": "Let new routers, and new adapters with them, start from an estimate of what a token loses where "
            "it skips, on this many sequences of the training data: near target_active_ratio, or, with budget_loss "
            "price, where it costs as much as that saves. Takes 12 bytes of memory for each token, layer (or half of "
            "one) and feature. 0: gates start open."
        },
    )
    static_selection_samples: int = field(
        default=0,
        metadata={
            "help": "Instead of routing, close the same gates for all tokens: those that cost least on this many "
            "sequences of the training data, greedily, until target_active_ratio. Only adapters are trained then. It "
            "is what routers have to beat. 0: route."
        },
    )

    def __post_init__(self) -> None:
        check("adapter_start_samples", self.adapter_start_samples, at_least=0)
        check("router_start_samples", self.router_start_samples, at_least=0)
        check("static_selection_samples", self.static_selection_samples, at_least=0)
        if self.router_start_samples and self.static_selection_samples:
            raise ConfigError(
                "--router_start_samples is for routers, and a static selection has none: give one of both"
            )

    def check_fits(self, router: RouterConfig) -> None:
        """Refuse routers that can't start from what is asked for.

        Raises:
            ConfigError: they are to be fitted, and have a hidden layer of 1; or only adapters are to be trained, and
                there are none.
        """
        if self.static_selection_samples and router.skip_adapter == "none":
            raise ConfigError(
                "--static_selection_samples trains adapters, and there are none; add --skip_adapter low_rank"
            )
        if self.router_start_samples and router.router_hidden_size == 1:
            raise ConfigError(
                "--router_start_samples needs routers that can say anything linear, but --router_hidden_size is 1; "
                "make it 0, or 2 and more"
            )
