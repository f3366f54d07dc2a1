"""The perplexity of an artifact as it is, beside that of PyTorch rounding activations alike.

Rounding activations to 8 bits, which is what makes an artifact with integer weights fast, amplifies the last digit of a
float to a step of an integer: two sound runtimes (or one, with another order of sums) then differ as much as either
does from the model without rounding. So logits and routes are compared on activations that are not rounded
(`modcompile.export.float_activations`), and the artifact as it is by what it makes of texts.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx
from transformers import PretrainedConfig

from modcompile.export.session import RoutedSession
from modcompile.export.verification import Verification
from modcompile.export.verification_inputs import Case
from modcompile.graph_inputs import graph_inputs
from modcompile.text_loss import TextLoss

SHIPPED_LENGTH = 192
"""Tokens of each row that is measured."""
_FORCED_ROWS = 2

Rows = Sequence[Sequence[int]]
Force = Callable[[RoutedSession, Case], None]
"""Lets PyTorch and a session decide as a case says."""


class ShippedPerplexity:
    """Of some rows, decided as the artifact does by itself; and of fewer for each other way that cases decide.

    `rounded` makes the graph of PyTorch that rounds activations, and decides as the model does at that time.
    `perplexity_unrounded` is that of the rows before the export rounded weights, None where it rounds none.
    """

    def __init__(
        self, rows: Rows, rounded: Callable[[], fx.GraphModule], perplexity_unrounded: float | None = None
    ) -> None:
        self._rows = rows
        self._rounded = rounded
        self._unrounded = perplexity_unrounded
        self._of_onnx: dict[str, torch.Tensor] = {}

    def measure(self, shipped: RoutedSession, cases: Sequence[Case], force: Force) -> None:
        """Run the artifact."""

        def logits(row: Sequence[int]) -> torch.Tensor:
            ids = np.array([row])
            mask = np.ones_like(ids)
            return torch.from_numpy(shipped.run(ids, mask, mask.cumsum(1) - 1, shipped.empty_cache(1))[0])

        own, *forced = _decisions(cases)
        self._of_onnx = {own.name: token_losses(logits, self._rows)}
        for case in forced:
            force(shipped, case)
            self._of_onnx[case.name] = token_losses(logits, self._rows[:_FORCED_ROWS])

    def compare(
        self, session: RoutedSession, cases: Sequence[Case], force: Force, result: Verification, *, has_gates: bool
    ) -> None:
        """Run PyTorch, and keep both; `session` is any that can be forced."""
        found = {}
        for index, case in enumerate(_decisions(cases)):
            force(session, case)
            rows = self._rows[:_FORCED_ROWS] if index else self._rows
            of_torch, of_onnx = token_losses(_logits_of(self._rounded()), rows), self._of_onnx[case.name]
            found[case.name] = {"torch": perplexity(of_torch), "onnx": perplexity(of_onnx)}
            if has_gates and not index:
                result.perplexity_noise = float((of_onnx - of_torch).std()) / len(of_onnx) ** 0.5
        result.perplexity_rounded = found.pop(cases[0].name)
        result.perplexities_forced = found
        result.perplexity_unrounded = self._unrounded


def perplexity_rows(config: PretrainedConfig, texts: Rows) -> list[list[int]]:
    """The rows to measure, no longer than the positions of the model."""
    longest = min(SHIPPED_LENGTH, getattr(config, "max_position_embeddings", None) or SHIPPED_LENGTH)
    return [list(row[:longest]) for row in texts]


def token_losses(logits_of: Callable[[Sequence[int]], torch.Tensor], rows: Rows) -> torch.Tensor:
    """The cross-entropy of every predicted token of the rows, float64 `[N]`, by their logits `[1, T, V]`."""
    losses = [
        torch.nn.functional.cross_entropy(logits_of(row)[0, :-1], torch.tensor(row[1:]), reduction="none")
        for row in rows
    ]
    return torch.cat(losses).double()


def perplexity(losses: torch.Tensor) -> float:
    """Of tokens, by their cross-entropies."""
    return TextLoss(float(losses.mean())).perplexity


def _logits_of(graph: fx.GraphModule) -> Callable[[Sequence[int]], torch.Tensor]:
    @torch.no_grad()
    def logits(row: Sequence[int]) -> torch.Tensor:
        found: torch.Tensor = graph(*graph_inputs(graph, torch.tensor([row])))[0]
        return found

    return logits


def _decisions(cases: Sequence[Case]) -> list[Case]:
    """A case for each way to decide, the artifact's own first."""
    found: dict[Any, Case] = {}
    for case in cases:
        found.setdefault((case.thresholds, case.precision_bias), case)
    return list(found.values())
