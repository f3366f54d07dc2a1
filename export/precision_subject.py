"""The verification of a model that chooses precisions: routes are the bits of each token."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from modcompile.export.float_activations import FloatActivations
from modcompile.export.overrides import BIAS_INPUT, THRESHOLD_INPUT
from modcompile.export.session import RoutedSession
from modcompile.export.shipped_perplexity import ShippedPerplexity
from modcompile.export.step_binding import Array
from modcompile.export.tell_branches import TellBranches
from modcompile.export.verification import Verification
from modcompile.export.verification_inputs import Case
from modcompile.layerwise import LayerwiseQuantizeForCausalLM


class PrecisionSubject:
    """For `verify_model`; each of its methods does what `Subject` says."""

    def __init__(self, model: LayerwiseQuantizeForCausalLM, shipped: ShippedPerplexity, hard_threshold: float) -> None:
        self._model = model
        self._shipped = shipped
        self._threshold = hard_threshold

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        return self._model.infer_forward(*inputs, **options)

    @property
    def branches(self) -> Mapping[int, Sequence[str]]:
        of_tokens = self._model.router_config.router_scope == "token"
        found = {}
        for layer in self._model.routers:
            names = [f"at {bits} bits" for bits in self._model.precisions]
            if layer in self._model.depth_routers:
                names.insert(0, "skipped")
            if of_tokens and len(names) > 1:
                names.append("with tokens of different bits")
            found[layer] = names
        return found

    def stored(self, case: Case) -> Mapping[str, Array]:
        held = {BIAS_INPUT: np.asarray(case.precision_bias, np.float32)}
        return held | ({THRESHOLD_INPUT: np.asarray(case.thresholds, np.float32)} if case.thresholds else {})

    def force(self, session: RoutedSession, case: Case) -> None:
        self._model.set_precision_bias(torch.tensor(case.precision_bias))
        session.set_precision_bias(case.precision_bias)
        if case.thresholds:
            self._model.set_hard_threshold(case.thresholds)
            session.thresholds = case.thresholds

    def restore(self) -> None:
        self._model.set_precision_bias(None)
        if self._model.depth_routers:
            self._model.set_hard_threshold(self._threshold)

    def tell(self, model: ir.Model) -> None:
        choosing = {layer: len(names) for layer, names in self.branches.items() if len(names) > 1}
        selecting = choosing if self._model.router_config.router_scope == "token" else self._model.depth_routers
        FloatActivations()(model)
        TellBranches(choosing, frozenset(selecting))(model)

    def torch_routes(self, output: Any) -> Array:
        return np.stack([bits.numpy() for bits in output.num_bits])

    def onnx_routes(self, told: Mapping[str, Array], ids: Array) -> tuple[Array, list[int]]:
        routes, taken = [], []
        for layer, names in self.branches.items():
            skippable = layer in self._model.depth_routers
            bits = np.array(([0] if skippable else []) + self._model.precisions)
            branch = int(told[f"branch.{layer}"]) if len(names) > 1 else 0
            selection = told[f"selection.{layer}"].squeeze(-1) if f"selection.{layer}" in told else np.ones_like(ids)
            if branch == len(bits):
                routes.append(bits[selection])
            else:
                # A block that ran although no token needed it was computed for all of them.
                of_some = selection.dtype == bool and selection.any()
                routes.append(np.where(selection, bits[branch], 0) if of_some else np.full(ids.shape, bits[branch]))
            taken.append(branch)
        return np.stack(routes), taken

    def measure_shipped(self, shipped: RoutedSession, cases: Sequence[Case], result: Verification) -> None:
        self._shipped.measure(shipped, cases, self.force)

    def compare_shipped(self, telling: RoutedSession, cases: Sequence[Case], result: Verification) -> None:
        has_gates = bool(self._model.depth_routers)
        self._shipped.compare(telling, cases, self.force, result, has_gates=has_gates)

    def arbitrate(self, session: RoutedSession, cases: Sequence[Case]) -> dict[str, dict[str, float]]:
        """None."""
        return {}

    def usage(self, routes: Array, tokens: Array) -> float:
        return float(routes[:, tokens].sum())

    def record(self, result: Verification, spent: float) -> None:
        result.average_bits = spent
