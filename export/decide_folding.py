"""Decide which gates are worth an `If`: those that skip often enough, on the machine at hand, to pay for it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx_ir as ir
import torch

from modcompile.export.break_even import BreakEven, measure_break_even
from modcompile.export.exportable import Exportable, Foldable
from modcompile.export.folding import Folding
from modcompile.export.session import MODEL_FILE
from modcompile.export.write_model import write_model
from modcompile.layer_ranges import name_of
from modcompile.modeling import RoutedForCausalLM

_CALIBRATION_TOKENS = 128  # of each text
_PROMPT_TOKENS = 32

Build = Callable[[Exportable], ir.Model]


@dataclass(frozen=True)
class DecidedFolding:
    """Which gates are folded, and why; rates are by the names of the gates' layers."""

    gates: tuple[range, ...]
    folding: Folding
    skip_rates: Mapping[str, float] = field(default_factory=dict)
    """Of the calibration tokens, of gates that nobody has asked to fold."""
    break_even: BreakEven | None = None
    """None where no gate depends on it."""

    def summary(self) -> str:
        """A line for a person."""
        folding, total = self.folding, len(self.gates)
        left = total - len(folding.active) - len(folding.skipped)
        counted = f"{left} of {total} gates kept, {len(folding.active)} always open, {len(folding.skipped)} never"
        measured = self.break_even
        if measured is not None:
            counted += (
                f"; a gate pays from {measured.skip_rate:.1%} of skipped steps (decoding one row: "
                f"{measured.dense_ms:.2f} ms a token without these gates, {measured.open_ms:.2f} all open, "
                f"{measured.skipping_ms:.2f} all skipping)"
            )
        return counted if left else f"{counted}: the artifact is dense"

    def as_json(self) -> dict[str, Any]:
        """What `report.json` holds."""
        measured = self.break_even
        return {
            "always_active": [name_of(layers) for layers in self.folding.active],
            "always_skipped": [name_of(layers) for layers in self.folding.skipped],
            "skip_rates": dict(self.skip_rates),
            "break_even_skip_rate": None if measured is None else measured.skip_rate,
            "decode_ms": None if measured is None else dict(vars(measured)),
        }


def decide_folding(foldable: Foldable, asked: Folding, build: Build, folder: Path) -> DecidedFolding:
    """Fold, besides the gates asked for, those that are constant on the texts, and those that skip too rarely.

    Where gates are decided at once, each is charged its share of the decision, though folding it alone saves its `If`
    only: that share is less than can be measured (`benchmarks.routing_overhead`). `build` lowers to ONNX; the models
    that are measured lie in `folder` for as long as that takes. What pays is judged for decoding one row, where a token
    alone decides on a block, and a gate saves as much as its layers compute. The rates are those of a model in which
    only the gates asked for are folded.

    Raises:
        ArtifactError: ONNX Runtime can't run what is measured.
    """
    model, texts = foldable.model, foldable.texts()
    gates = model.gated_layers
    rates = _skip_rates(model, asked, texts)
    constant = Folding(
        asked.active + tuple(layers for layers in rates if rates[layers] == 0),
        asked.skipped + tuple(layers for layers in rates if rates[layers] == 1),
    )
    named = {name_of(layers): rate for layers, rate in rates.items()}
    left = constant.kept(gates, gates)
    if not left:
        return DecidedFolding(gates, _sorted(constant), named)
    open_folding = Folding(constant.active + tuple(left), constant.skipped)
    with TemporaryDirectory(dir=folder) as scratch:
        files: list[Path] = []
        for name, folding in (("gated", constant), ("dense", open_folding)):
            files.append(Path(scratch) / name / MODEL_FILE)
            files[-1].parent.mkdir()
            write_model(build(foldable.fold(folding)), files[-1], f"{MODEL_FILE}.data")
        gated, dense = files
        measured = measure_break_even(gated, dense, [token for text in texts for token in text][:_PROMPT_TOKENS])
    work = {layers: sum(model.work[layer] for layer in layers) for layers in left}
    rare = too_rare(rates, work, measured.skip_rate)
    return DecidedFolding(gates, _sorted(Folding(constant.active + rare, constant.skipped)), named, measured)


def too_rare(rates: Mapping[range, float], work: Mapping[range, float], skip_rate: float) -> tuple[range, ...]:
    """Of the gates in `work`, those that skip too rarely, where `skip_rate` is the least of the average gate.

    A gate saves as much as its layers compute, and costs what any gate does.
    """
    average = sum(work.values()) / len(work)
    return tuple(layers for layers in work if rates[layers] * work[layers] / average < skip_rate)


def _sorted(folding: Folding) -> Folding:
    def by_layer(gates: tuple[range, ...]) -> tuple[range, ...]:
        return tuple(sorted(gates, key=lambda layers: layers.start))

    return Folding(by_layer(folding.active), by_layer(folding.skipped))


def _skip_rates(model: RoutedForCausalLM, asked: Folding, texts: Sequence[Sequence[int]]) -> dict[range, float]:
    """For each gate that is not asked to be folded, the share of the tokens that it skips, as the model is."""
    before = model.hard_thresholds
    assert before is not None
    model.set_router_mode(asked.thresholds(before, model.gated_layers))
    longest = getattr(model.config, "max_position_embeddings", None) or _CALIBRATION_TOKENS
    skipped = dict.fromkeys(asked.kept(model.gated_layers, model.gated_layers), 0)
    tokens = 0
    with torch.no_grad():
        for text in texts:
            row = list(text[: min(_CALIBRATION_TOKENS, longest)])
            output = model(torch.tensor([row], device=model.device), use_cache=False)
            assert output.gates is not None
            masks = dict(zip(model.routed_layers, output.gates, strict=True))
            for layers in skipped:
                skipped[layers] += int((~masks[layers.start]).sum())
            tokens += len(row)
    model.set_router_mode(before)
    return {layers: count / tokens for layers, count in skipped.items()}
