"""Folders that can be exported, whichever routers they hold."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import torch
from torch import fx, nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from modcompile.artifacts import load_with_routers
from modcompile.calibrated_thresholds import number_for
from modcompile.errors import ConfigError
from modcompile.export.depth_subject import DepthSubject
from modcompile.export.export_config import ExportConfig
from modcompile.export.folding import UNFOLDED, Folding
from modcompile.export.precision_cases import precision_cases
from modcompile.export.precision_subject import PrecisionSubject
from modcompile.export.round_to_half import round_to_half
from modcompile.export.round_weights import calibrated, round_for_text, round_weights
from modcompile.export.shipped_perplexity import Rows, ShippedPerplexity, perplexity, perplexity_rows, token_losses
from modcompile.export.subject import Subject
from modcompile.export.verification_inputs import Case, verification_cases
from modcompile.layerwise import LayerwiseQuantizeForCausalLM
from modcompile.modeling import RoutedForCausalLM
from modcompile.passes.quantize_weights import quantize_weights
from modcompile.passes.round_activations import round_activations
from modcompile.precision_folder import holds_precisions
from modcompile.precisions import PackedWeight

MakeGraph = Callable[[], fx.GraphModule]

_MAX_POSITIONS = 32768  # of a model that sets itself no limit


@dataclass(frozen=True)
class Proof:
    """What `verify_model` takes."""

    subject: Subject
    cases: list[Case]


@dataclass(frozen=True)
class Foldable:
    """What has gates that an export may decide once and for all."""

    model: RoutedForCausalLM
    """Hard."""
    texts: Callable[[], Rows]
    """What rates are measured on, made when asked for."""
    fold: "Callable[[Folding], Exportable]"
    """The same with some gates folded."""


@dataclass(frozen=True)
class Exportable:
    """A loaded folder, its weights rounded as it is to be exported."""

    graph: MakeGraph
    """What is lowered to ONNX."""
    config: PretrainedConfig
    proof: Proof | None
    """None where nothing is to be verified."""
    foldable: Foldable | None = None
    """None where routers choose precisions."""

    @property
    def max_positions(self) -> int:
        """How many tokens a sequence may have."""
        return int(getattr(self.config, "max_position_embeddings", _MAX_POSITIONS))


def load_exportable(
    source: Path,
    config: ExportConfig,
    texts_of: Callable[[PretrainedConfig], Rows],
    tokenizer_of: Callable[[], PreTrainedTokenizerBase | None] = lambda: None,
) -> Exportable:
    """Read a routed or quantized folder to export it; `texts_of` gives 8 rows of token ids for its configuration.

    `tokenizer_of` is asked where weights are to be rounded for a text.

    Raises:
        ArtifactError, CheckpointError: it can't be read.
        UnsupportedModelError: its weights are to be rounded, and are look-up tables in part.
        ConfigError: gates of a quantized folder are to be folded, or its weights rounded for a text.
        DataError: weights are to be rounded for a text, and there is no tokenizer, or one of another model.
    """
    if holds_precisions(source):
        if config.rounding == "gptq":
            raise ConfigError(
                f"--rounding gptq is for routed folders, and the blocks of {source} are quantized; leave it out, and "
                "give --weights int8, which costs embedding and head next to nothing"
            )
        if config.always_active is not None or config.always_skipped is not None:
            raise ConfigError(
                f"--always_active and --always_skipped are for the gates of routed folders, and {source} is quantized; "
                "leave them out"
            )
        threshold = number_for(source, config.hard_threshold)
        return _of_precisions(LayerwiseQuantizeForCausalLM.from_quantized(source), config, threshold, texts_of)
    return of_gates(load_with_routers(source, config.hard_threshold), config, texts_of, tokenizer_of)


def of_gates(
    model: RoutedForCausalLM,
    config: ExportConfig,
    texts_of: Callable[[PretrainedConfig], Rows],
    tokenizer_of: Callable[[], PreTrainedTokenizerBase | None] = lambda: None,
) -> Exportable:
    """The same of a model in float32 that is at hand, hard at the thresholds that the artifact is to have."""
    is_proved, thresholds = config.verify == "full", model.hard_thresholds
    assert thresholds is not None
    rounding, nearest, gates = config.weight_rounding, config.nearest_rounding, model.gated_layers

    @cache
    def texts() -> Rows:
        return texts_of(model.config)

    rows = perplexity_rows(model.config, texts()) if is_proved else []
    before: float | None = None
    weights: Mapping[nn.Parameter, PackedWeight] = {}
    if is_proved and config.weights != "fp32":
        before = _perplexity(model, rows)
    if rounding is not None and nearest is not None:
        rounded_for_text: Mapping[nn.Parameter, PackedWeight] = {}
        if config.rounding == "gptq":
            # Only here: it takes a second to import.
            from modcompile.calibration_text import load_calibration_text

            text = load_calibration_text(calibrated(rounding), tokenizer_of(), model.config)
            assert text is not None
            rounded_for_text = round_for_text(model.base, rounding, text)
        weights = round_weights(model.hard_graph(), rounding=nearest, rounded=rounded_for_text)
    elif config.weights == "fp16":
        round_to_half(model.hard_graph())
    cases = verification_cases(model, texts(), thresholds) if is_proved else []

    def fold(folding: Folding) -> Exportable:
        graph: MakeGraph = partial(folding.graph, model)
        rounded = graph
        if rounding is not None:
            graph, rounded = _on_codes(graph, graph, weights)
        proof = None
        if is_proved:
            perplexity = ShippedPerplexity(rows, rounded, before) if config.weights != "fp32" else None
            forced = [replace(case, thresholds=tuple(folding.thresholds(case.thresholds, gates))) for case in cases]
            proof = Proof(DepthSubject(model, perplexity, folding), forced)
        return Exportable(graph, model.config, proof, Foldable(model, texts, fold))

    return fold(UNFOLDED)


def _of_precisions(
    model: LayerwiseQuantizeForCausalLM,
    config: ExportConfig,
    threshold: float,
    texts_of: Callable[[PretrainedConfig], Rows],
) -> Exportable:
    if model.depth_routers:
        model.set_hard_threshold(threshold)
    is_proved = config.verify == "full"
    texts = texts_of(model.config) if is_proved else []
    rows = perplexity_rows(model.config, texts)
    graph, rounded, before = model.export_graph, model.rounded_graph, None
    if is_proved and config.weights != "fp32":
        before = _perplexity(model, rows)
    if config.weights == "fp16":
        round_to_half(graph())
    if config.weight_rounding is not None:
        whole = graph()
        # Blocks have their precisions, of which 16 bits are the original weights.
        ends = [whole.get_submodule(name) for name in ("prologue", "epilogue")]
        weights = round_weights(*ends, rounding=config.weight_rounding)
        graph, rounded = _on_codes(graph, rounded, weights)
    if not is_proved:
        return Exportable(graph, model.config, None)
    subject = PrecisionSubject(model, ShippedPerplexity(rows, rounded, before), threshold)
    return Exportable(graph, model.config, Proof(subject, precision_cases(model, texts, threshold)))


def _on_codes(
    graph: MakeGraph, rounded: MakeGraph, weights: Mapping[nn.Parameter, PackedWeight]
) -> tuple[MakeGraph, MakeGraph]:
    """What makes the graph that is exported, and the one that rounds the inputs of those weights, too."""
    return (
        lambda: quantize_weights(graph(), weights),
        lambda: round_activations(rounded(), {weight: packed.group_size for weight, packed in weights.items()}),
    )


def _perplexity(model: RoutedForCausalLM | LayerwiseQuantizeForCausalLM, rows: Rows) -> float:
    return perplexity(token_losses(lambda row: model(torch.tensor([row])).logits, rows))
