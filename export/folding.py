"""Gates that an export decides once and for all."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import fx

from modcompile.errors import ConfigError
from modcompile.export.folded_layers import ALWAYS_ACTIVE, ALWAYS_SKIPPED, names_of
from modcompile.granularity import Granularity, halves_blocks, halves_of, label_of, layer_of
from modcompile.layer_ranges import layers_in, name_of, runs_of
from modcompile.modeling import RoutedForCausalLM
from modcompile.passes import harden_gates, lower_gates
from modcompile.passes.fold_gates import fold_gates

_EXECUTING, _SKIPPING = 0.0, 2.0  # thresholds
_ALL = "all"

_T = TypeVar("_T")


@dataclass(frozen=True)
class Folding:
    """By their layers, the gates that are always open, and those that are always closed."""

    active: tuple[range, ...] = ()
    skipped: tuple[range, ...] = ()

    def kept(self, values: Sequence[_T], gates: Sequence[range]) -> list[_T]:
        """Of a value for each of a model's gates, those of gates that are left."""
        folded = {*self.active, *self.skipped}
        return [value for value, layers in zip(values, gates, strict=True) if layers not in folded]

    def thresholds(self, values: Sequence[float], gates: Sequence[range]) -> list[float]:
        """Thresholds, one for each of a model's gates, at which it does what the artifact does at the ones given."""
        forced = dict.fromkeys(self.active, _EXECUTING) | dict.fromkeys(self.skipped, _SKIPPING)
        return [forced.get(layers, value) for value, layers in zip(values, gates, strict=True)]

    def graph(self, model: RoutedForCausalLM) -> fx.GraphModule:
        """The lowered graph of a hard model, at its thresholds."""
        assert model.hard_thresholds is not None
        gm = lower_gates(fold_gates(harden_gates(model.graph), self.active, self.skipped))
        for index, threshold in enumerate(self.kept(model.hard_thresholds, model.gated_layers)):
            gm.get_buffer("routing_threshold")[index] = threshold
        return gm

    def metadata(self) -> dict[str, str]:
        """What an artifact tells of it."""
        told = {ALWAYS_ACTIVE: names_of(self.active), ALWAYS_SKIPPED: names_of(self.skipped)}
        return {key: names for key, names in told.items() if names}


UNFOLDED = Folding()


def asked_folding(
    always_active: str | None, always_skipped: str | None, gates: Sequence[range], granularity: Granularity = "block"
) -> Folding:
    """The gates whose layers are named, in lists such as `0-3,7`, or `all`.

    Where gates are of halves, `7` is what is gated of layer 7 of the model, and `7.mlp` is one half of it.

    Raises:
        ConfigError: a list is none, or names a layer without a gate, some but not all layers of a gate, or a layer that
            the other names, too.
    """
    active = _named("always_active", always_active, gates, granularity)
    skipped = _named("always_skipped", always_skipped, gates, granularity)
    for layers in active:
        if layers in skipped:
            layer = label_of(layers[0], granularity)
            raise ConfigError(f"--always_active and --always_skipped both name layer {layer}; take one of them")
    return Folding(active, skipped)


def _named(flag: str, text: str | None, gates: Sequence[range], granularity: Granularity) -> tuple[range, ...]:
    if text is None:
        return ()
    if text == _ALL:
        return tuple(gates)
    routed = {layer for layers in gates for layer in layers}
    halves = {label_of(layer, granularity): layer for layer in routed} if halves_blocks(granularity) else {}
    named: set[int] = set()
    for name in text.split(","):
        if name in halves:
            named.add(halves[name])
            continue
        try:
            layers_named = layers_in(name)
        except ValueError as error:
            example = "0-3,7.mlp" if halves else "0-3,7"
            raise ConfigError(f"--{flag} is {text!r}; give layers, such as {example}, or {_ALL}") from error
        for layer in layers_named:
            parts = set(halves_of(layer, granularity))
            if not parts & routed:
                known = _known(gates, granularity)
                raise ConfigError(f"--{flag} names layer {layer}, which has no gate; gates have {known}")
            named |= parts
    found = tuple(layers for layers in gates if named & set(layers))
    for layers in found:
        for layer in sorted(set(layers) - named):
            raise ConfigError(f"--{flag} leaves out layer {layer} of {name_of(layers)}, which share a gate; name all")
    return found


def _known(gates: Sequence[range], granularity: Granularity) -> str:
    """The layers of the model that have gates."""
    layers = sorted({layer_of(layer, granularity) for gate in gates for layer in gate})
    return names_of(runs_of(layers)) if halves_blocks(granularity) else names_of(gates)
