"""The verification of a model that chooses precisions: routes are the bits of each token.

It has two parts, as rounding activations to 8 bits, which is what makes an artifact fast, amplifies the last digit of a
float to a step of an integer: two sound runtimes (or one, with another order of sums) then differ as much as either
does from the model without rounding. So the artifact's graph is compared with PyTorch logit by logit and route by route
on activations that are not rounded; and the artifact as it is by its perplexity, with PyTorch rounding alike.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from modcompile.export.float_activations import FloatActivations
from modcompile.export.overrides import BIAS_INPUT, THRESHOLD_INPUT
from modcompile.export.session import RoutedSession
from modcompile.export.step_binding import Array
from modcompile.export.tell_branches import TellBranches
from modcompile.export.verification import Verification
from modcompile.export.verification_inputs import Case
from modcompile.layerwise import LayerwiseQuantizeForCausalLM
from modcompile.text_loss import TextLoss

SHIPPED_LENGTH = 192
"""Tokens of each row by which the perplexity of the artifact as it is is measured."""
_FORCED_ROWS = 2


class PrecisionSubject:
    """For `verify_model`; each of its methods does what `Subject` says."""

    def __init__(
        self, model: LayerwiseQuantizeForCausalLM, texts: Sequence[Sequence[int]], hard_threshold: float
    ) -> None:
        self._model = model
        self._threshold = hard_threshold
        longest = min(SHIPPED_LENGTH, getattr(model.config, "max_position_embeddings", None) or SHIPPED_LENGTH)
        self._rows = [list(row[:longest]) for row in texts]
        self._losses: dict[str, TextLoss] = {}

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
        """The cross-entropy of longer rows, as the artifact is; and of fewer for each way to force its decisions."""

        def logits(row: list[int]) -> torch.Tensor:
            ids = np.array([row])
            mask = np.ones_like(ids)
            return torch.from_numpy(shipped.run(ids, mask, mask.cumsum(1) - 1, shipped.empty_cache(1))[0])

        own, *forced = _decisions(cases)
        self._losses = {own.name: _text_loss(logits, self._rows)}
        for case in forced:
            self.force(shipped, case)
            self._losses[case.name] = _text_loss(logits, self._rows[:_FORCED_ROWS])

    def compare_shipped(self, telling: RoutedSession, cases: Sequence[Case], result: Verification) -> None:
        """The same in PyTorch, rounding alike."""

        def logits(row: list[int]) -> torch.Tensor | None:
            return self._model.infer_forward(torch.tensor([row])).logits

        own, *forced = _decisions(cases)
        self.force(telling, own)
        self._model.round_activations(enabled=True)
        perplexities = {own.name: self._both(own, _text_loss(logits, self._rows))}
        for case in forced:
            self.force(telling, case)
            perplexities[case.name] = self._both(case, _text_loss(logits, self._rows[:_FORCED_ROWS]))
        self._model.round_activations(enabled=False)
        result.perplexity_rounded = perplexities.pop(own.name)
        result.perplexities_forced = perplexities

    def _both(self, case: Case, of_torch: TextLoss) -> dict[str, float]:
        return {"torch": of_torch.perplexity, "onnx": self._losses[case.name].perplexity}

    def arbitrate(self, session: RoutedSession, cases: Sequence[Case]) -> dict[str, dict[str, float]]:
        """None."""
        return {}

    def usage(self, routes: Array, tokens: Array) -> float:
        return float(routes[:, tokens].sum())

    def record(self, result: Verification, spent: float) -> None:
        result.average_bits = spent


def _decisions(cases: Sequence[Case]) -> list[Case]:
    """A case for each way to decide, the artifact's own first."""
    found: dict[Any, Case] = {}
    for case in cases:
        found.setdefault((case.thresholds, case.precision_bias), case)
    return list(found.values())


def _text_loss(logits_of: Callable[[list[int]], torch.Tensor | None], rows: Sequence[list[int]]) -> TextLoss:
    """Over all predicted tokens of the rows."""
    total = 0.0
    for row in rows:
        logits = logits_of(row)
        assert logits is not None
        total += float(torch.nn.functional.cross_entropy(logits[0, :-1], torch.tensor(row[1:]), reduction="sum"))
    return TextLoss(total / sum(len(row) - 1 for row in rows))
