"""The verification of a model with depth gates: routes are whether a token was executed."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from modcompile.export.compare_in_double import errors_to_double
from modcompile.export.float_activations import FloatActivations
from modcompile.export.folding import UNFOLDED, Folding
from modcompile.export.overrides import THRESHOLD_INPUT
from modcompile.export.paired_steps import largest
from modcompile.export.session import RoutedSession
from modcompile.export.shipped_perplexity import ShippedPerplexity
from modcompile.export.step_binding import Array
from modcompile.export.tell_routes import BRANCH, TellRoutes, has_unmasked_branch
from modcompile.export.verification import Verification
from modcompile.export.verification_inputs import Case
from modcompile.layer_ranges import name_of
from modcompile.modeling import RoutedForCausalLM


class DepthSubject:
    """For `verify_model`; each of its methods does what `Subject` says.

    Cases have thresholds for all gates of the model, routes are those of the gates that are left.
    """

    def __init__(
        self,
        model: RoutedForCausalLM,
        perplexity: ShippedPerplexity | None = None,
        folding: Folding = UNFOLDED,
    ) -> None:
        """`perplexity` is for an artifact with integer weights."""
        self._model = model
        self._folding = folding
        self._gates = folding.kept(model.gated_layers, model.gated_layers)
        self._layers = [layer for layers in self._gates for layer in layers]
        self._unmasked: set[range] = set()  # known once a graph tells
        self._before = model.hard_thresholds
        self._perplexity = perplexity
        self._shipped: Array = np.zeros(0)

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        return self._model(*inputs, **options)

    @property
    def branches(self) -> Mapping[int, Sequence[str]]:
        names = ("skipped", "executed", "executed without masks")
        return {layer: names[: 3 if layers in self._unmasked else 2] for layers in self._gates for layer in layers}

    def stored(self, case: Case) -> Mapping[str, Array]:
        return {THRESHOLD_INPUT: np.asarray(self._left(case), np.float32)} if self._gates else {}

    def force(self, session: RoutedSession, case: Case) -> None:
        self._model.set_router_mode(list(case.thresholds))
        session.thresholds = self._left(case)

    def restore(self) -> None:
        self._model.set_router_mode(self._before)

    def tell(self, model: ir.Model) -> None:
        FloatActivations()(model)
        self._unmasked = {layers for layers in self._gates if has_unmasked_branch(model, layers)}
        TellRoutes(self._gates)(model)

    def torch_routes(self, output: Any) -> Array:
        gates = dict(zip(self._model.routed_layers, output.gates, strict=True))
        return _stacked([gates[layer].squeeze(-1).numpy() for layer in self._layers], output.tokens)

    def onnx_routes(self, told: Mapping[str, Array], ids: Array) -> tuple[Array, list[int]]:
        masks = [told[f"routing.{name_of(layers)}"] for layers in self._gates for _ in layers]
        return _stacked(masks, ids), [int(told[f"{BRANCH}{name_of(layers)}"]) for layers in self._gates for _ in layers]

    def measure_shipped(self, shipped: RoutedSession, cases: Sequence[Case], result: Verification) -> None:
        if self._perplexity is None:
            self._shipped = _first_row_logits(shipped, cases[0])
        else:
            self._perplexity.measure(shipped, _sure_cases(cases), self.force)

    def compare_shipped(self, telling: RoutedSession, cases: Sequence[Case], result: Verification) -> None:
        """The logits of the first row must be those of the graph that tells, but for rounded activations."""
        if self._perplexity is None:
            telling.thresholds = self._left(cases[0])
            result.cases["as shipped"] = largest(self._shipped - _first_row_logits(telling, cases[0]))
        else:
            self._perplexity.compare(telling, _sure_cases(cases), self.force, result, has_gates=bool(self._gates))

    def arbitrate(self, session: RoutedSession, cases: Sequence[Case]) -> dict[str, dict[str, float]]:
        """Against float64."""
        return errors_to_double(self, self._model, session, cases)

    def usage(self, routes: Array, tokens: Array) -> float:
        work = np.array([self._model.work[layer] for layer in self._layers])
        return float((routes & tokens).sum((1, 2)) @ work)

    def record(self, result: Verification, spent: float) -> None:
        """Layers of folded gates count with what they are folded to."""
        work = self._model.work
        active = sum(work[layer] for layers in self._folding.active for layer in layers)
        result.active_ratio = (spent * len(self._layers) + active) / sum(work.values())

    def _left(self, case: Case) -> list[float]:
        return self._folding.kept(case.thresholds, self._model.gated_layers)


def _stacked(masks: Sequence[Array], like: Any) -> Array:
    """`[R, B, T]`, be R 0, of masks that are of the shape of `like`."""
    return np.array(masks, bool).reshape(len(masks), *like.shape)


def _sure_cases(cases: Sequence[Case]) -> list[Case]:
    """The artifact's own decisions, and those forced ones that no rounding can turn."""
    return [cases[0], *(case for case in cases[1:] if all(not 0 < threshold < 1 for threshold in case.thresholds))]


def _first_row_logits(session: RoutedSession, case: Case) -> Array:
    """Prefill and decode steps in one call."""
    ids = np.array([case.prefills[0] + case.decodes[0]])
    mask = np.ones_like(ids)
    logits, _, _ = session.run(ids, mask, mask.cumsum(1) - 1, session.empty_cache(1))
    return logits
