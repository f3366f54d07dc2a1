"""The options of routers and their training, and what is wrong with them."""

import math
from dataclasses import dataclass, field
from typing import Literal

from modcompile.errors import ConfigError
from modcompile.granularity import GRANULARITIES, Granularity, halves_blocks, halves_of
from modcompile.layer_ranges import layers_in, runs_of

GateKind = Literal["soft", "straight_through", "hard_concrete"]
BudgetLoss = Literal["hinge", "squared", "per_layer", "price"]
SkipAdapterKind = Literal["none", "scale", "low_rank"]

AUTO_LAYERS = "auto"
INIT_BIAS: dict[str, float] = {"soft": 4.0, "straight_through": 0.2, "hard_concrete": 3.0}
"""Where a router's logits start, by kind of gate, unless `router_init_bias` says otherwise.

Soft, it decides how far the untrained model is from the dense one; hard concrete, how often noise closes a gate in
training: half or more 5 % of the time at 3. Straight-through, the untrained model is the dense one whatever the bias,
and a small bias lets a gate close as soon as its token can do without the block. Measured with the training of `make
demo` (and `--seed 0`), dense 17.25, by bias: perplexity at the share of the work left.

    0.05: 18.85 at 0.915     0.2: 18.94 at 0.913     0.5: 19.98 at 0.914
    1.5:  21.72 at 0.915     3:   24.35 at 0.907     4:   18.38 at 0.982, short of its target
"""


@dataclass(frozen=True)
class RouterConfig:
    """Which decoder blocks are routed, and by what; stored beside the routers.

    Raises:
        ConfigError: an option is outside of its range.
    """

    router_hidden_size: int = field(
        default=32,
        metadata={"help": "Width of a router's hidden layer; 0 for a router without one, a single linear product."},
    )
    router_dropout: float = field(default=0.0, metadata={"help": "Dropout on a router's hidden layer while training."})
    granularity: Granularity = field(
        default="block",
        metadata={
            "help": "What a gate executes or skips of a layer. block: all of it. attn, mlp: its attention or its MLP, "
            "and the other half is always executed. attn+mlp: each has a gate of its own. The halves of layer i are "
            "told as 2 i, its attention, and 2 i + 1."
        },
    )
    blocks_per_gate: int = field(
        default=1,
        metadata={
            "help": "Give so many consecutive layers one router and gate, that execute or skip all of them for a "
            "token. Where the routed layers are no multiple of it, the last gate has fewer."
        },
    )
    gates_per_decision: int = field(
        default=1,
        metadata={
            "help": "Decide so many consecutive gates at once, from the hidden state in front of the first of them: an "
            "export then has one product for all of them. Where the gates are no multiple of it, the last decision is "
            "on fewer."
        },
    )
    router_pattern: Literal["all", "every_other"] = field(
        default="all",
        metadata={"help": "Route all layers of the range, or every other one, beginning with the first of the range."},
    )
    router_start: int = field(default=0, metadata={"help": "First layer of the range that is routed."})
    router_stop: int | None = field(
        default=None, metadata={"help": "Layer before which the range ends (by default the number of layers)."}
    )
    router_layers: str | None = field(
        default=None,
        metadata={
            "help": "Of these layers, a list such as 2-10,12, route only those in this list. auto: those that some "
            "tokens could do without, judged on a built-in text."
        },
    )
    lock_first_layers: int = field(
        default=0, metadata={"help": "Leave this many layers at the bottom of the model unrouted, always executed."}
    )
    lock_last_layers: int = field(
        default=0, metadata={"help": "Leave this many layers at the top of the model unrouted, always executed."}
    )
    layer_norm_router_input: bool = field(
        default=True, metadata={"help": "Normalise what a router reads (a layer norm without weights)."}
    )
    gate: GateKind = field(
        default="straight_through",
        metadata={
            "help": "soft: the gate is the sigmoid, blocks are mixed (trained and hard usage then differ). "
            "straight_through: the gate is 0 or 1 in the forward pass, so that what is trained is what will be "
            "skipped. hard_concrete: the gate is noisy in training, and often exactly 0 or 1."
        },
    )
    router_init_bias: float | None = field(
        default=None,
        metadata={
            "help": "Where router logits start; positive is open. By default 4.0 for soft, 0.2 for straight_through, "
            "3.0 for hard_concrete."
        },
    )
    skip_adapter: SkipAdapterKind = field(
        default="none",
        metadata={
            "help": "What a token goes through in the place of a block that it skips. none: nothing. scale: a factor "
            "and a shift for each feature. low_rank: hidden + up(down(hidden)). It is trained with the routers."
        },
    )
    adapter_rank: int = field(default=16, metadata={"help": "Numbers between down and up in an adapter of low rank."})

    def __post_init__(self) -> None:
        check("router_hidden_size", self.router_hidden_size, at_least=0)
        check("router_dropout", self.router_dropout, at_least=0, below=1)
        check("blocks_per_gate", self.blocks_per_gate, at_least=1)
        check("gates_per_decision", self.gates_per_decision, at_least=1)
        check("router_start", self.router_start, at_least=0)
        check("lock_first_layers", self.lock_first_layers, at_least=0)
        check("lock_last_layers", self.lock_last_layers, at_least=0)
        check_choice("router_pattern", self.router_pattern, ("all", "every_other"))
        check_choice("granularity", self.granularity, GRANULARITIES)
        check("adapter_rank", self.adapter_rank, at_least=1)
        check_choice("gate", self.gate, tuple(INIT_BIAS))
        check_choice("skip_adapter", self.skip_adapter, ("none", "scale", "low_rank"))
        if self.router_layers not in (None, AUTO_LAYERS):
            _layers_in(self.router_layers)
        if self.blocks_per_gate > 1 and self.router_pattern == "every_other":
            raise ConfigError(
                f"--blocks_per_gate {self.blocks_per_gate} is for consecutive layers, and --router_pattern every_other "
                "routes none; leave one of them out"
            )
        if self.blocks_per_gate > 1 and halves_blocks(self.granularity):
            raise ConfigError(
                f"--blocks_per_gate {self.blocks_per_gate} is for whole blocks, and --granularity is "
                f"{self.granularity}; leave one of them out"
            )
        if self.router_init_bias is not None:
            # An open gate is what makes the untrained model, run hard, the dense one.
            check("router_init_bias", self.router_init_bias, above=0)

    @property
    def init_bias(self) -> float:
        """Where the router logits start: positive, so open."""
        return INIT_BIAS[self.gate] if self.router_init_bias is None else self.router_init_bias

    def routed_layers(self, num_layers: int) -> list[int]:
        """The model's layers that a gate executes or skips, or parts of them, in order; layers that share a gate each.

        Raises:
            ConfigError: the range lies outside of the model, or selects nothing; or `auto` has not been resolved.
        """
        if self.router_layers == AUTO_LAYERS:
            raise ConfigError(
                "--router_layers auto chooses while a model is rewritten, and not for several precisions; give a list"
            )
        stop = num_layers if self.router_stop is None else self.router_stop
        if not self.router_start < stop <= num_layers:
            raise ConfigError(
                f"--router_start {self.router_start} --router_stop {stop} is no range of layers of this model: "
                f"it has {num_layers}, so 0 <= start < stop <= {num_layers}"
            )
        step = 1 if self.router_pattern == "all" else 2
        free = range(self.lock_first_layers, num_layers - self.lock_last_layers)
        listed = set(range(num_layers)) if self.router_layers is None else _layers_in(self.router_layers)
        if unknown := listed - set(range(num_layers)):
            raise ConfigError(
                f"--router_layers {self.router_layers} names layer {min(unknown)}, but this model has the layers 0 to "
                f"{num_layers - 1}"
            )
        layers = [layer for layer in range(self.router_start, stop, step) if layer in free and layer in listed]
        if not layers:
            only = "" if self.router_layers is None else f", of the layers {self.router_layers}"
            raise ConfigError(
                f"no layer is left to route: layers {self.router_start} to {stop - 1}, without the first "
                f"{self.lock_first_layers} and the last {self.lock_last_layers} of {num_layers}{only}; widen the range "
                "or lock fewer"
            )
        return layers

    def gated_layers(self, num_layers: int) -> list[range]:
        """For each gate, in order, the layers that it executes or skips together, of a model with `num_layers`.

        These are `blocks_per_gate`, or what is left of consecutive ones; or one half (`granularity`).

        Raises:
            ConfigError: the range lies outside of the model, or selects nothing.
        """
        size, routed = self.blocks_per_gate, self.routed_layers(num_layers)
        if halves_blocks(self.granularity):
            halves = [half for layer in routed for half in halves_of(layer, self.granularity)]
            return [range(half, half + 1) for half in halves]
        runs = runs_of(routed)
        return [run[start : start + size] for run in runs for start in range(0, len(run), size)]


@dataclass(frozen=True)
class BudgetConfig:
    """How much of the model is to be used, and how hard training pushes for it.

    Raises:
        ConfigError: an option is outside of its range.
    """

    router_lambda: float = field(
        default=0.01, metadata={"help": "Weight of the budget loss (see budget_loss); 0 for a warm-up."}
    )
    target_active_ratio: float = field(
        default=0.7, metadata={"help": "Share of (token, routed layer) pairs that shall be executed, in [0, 1]."}
    )
    budget_loss: BudgetLoss = field(
        default="hinge",
        metadata={
            "help": "hinge: max(active_ratio - target_active_ratio, 0). squared: their difference squared, so that too "
            "little use is charged as well. per_layer: the hinge of each routed layer by itself, averaged. price: each "
            "block that a token goes through costs router_lambda nats, whatever the target; modcompile.calibrate then "
            "finds thresholds for budgets."
        },
    )
    price_spread: float = field(
        default=1.0,
        metadata={
            "help": "With budget_loss price, train for many budgets at once: each sequence has a price of its own, "
            "router_lambda times up to this factor, or divided by it."
        },
    )
    target_warmup_ratio: float = field(
        default=0.0,
        metadata={"help": "Let the target fall from 1 to target_active_ratio over this share of the steps."},
    )

    def __post_init__(self) -> None:
        check("router_lambda", self.router_lambda, at_least=0)
        check("target_active_ratio", self.target_active_ratio, at_least=0, at_most=1)
        check("target_warmup_ratio", self.target_warmup_ratio, at_least=0, at_most=1)
        check_choice("budget_loss", self.budget_loss, ("hinge", "squared", "per_layer", "price"))
        check("price_spread", self.price_spread, at_least=1)
        if self.budget_loss == "price":
            check("router_lambda", self.router_lambda, above=0)
            if self.target_warmup_ratio:
                raise ConfigError("--target_warmup_ratio is of a target, and a price has none; leave it out")
        elif self.price_spread != 1:
            raise ConfigError("--price_spread is of prices; add --budget_loss price")


def _layers_in(names: str | None) -> set[int]:
    try:
        return set(layers_in(str(names)))
    except ValueError:
        raise ConfigError(f"--router_layers is {names!r}; it must be a list of layers such as 2-10,12") from None


def check_threshold(value: float) -> float:
    """A threshold on gates: 0 executes everything, 1 and more skips everything.

    Raises:
        ConfigError: it is negative, infinite or not a number.
    """
    check("hard_threshold", value, at_least=0)
    return float(value)


def check(
    name: str,
    value: float,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> None:
    """Raise a ConfigError that names the flag unless `value` is a finite number within the bounds."""
    bounds = [
        (at_least, "at least", lambda bound: value >= bound),
        (above, "above", lambda bound: value > bound),
        (at_most, "at most", lambda bound: value <= bound),
        (below, "below", lambda bound: value < bound),
    ]
    wanted = " and ".join(f"{words} {bound:g}" for bound, words, _ in bounds if bound is not None)
    if not math.isfinite(value) or not all(holds(bound) for bound, _, holds in bounds if bound is not None):
        raise ConfigError(f"--{name} is {value:g}; it must be a number, {wanted}")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise a ConfigError that names the flag unless `value` is one of `choices`."""
    if value not in choices:
        raise ConfigError(f"--{name} is {value!r}; it must be one of {', '.join(choices)}")
