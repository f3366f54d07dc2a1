"""Folders that can be exported, whichever routers they hold."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import fx
from transformers import PretrainedConfig

from modcompile.artifacts import load_with_routers
from modcompile.export.depth_subject import DepthSubject
from modcompile.export.export_config import ExportConfig
from modcompile.export.precision_cases import precision_cases
from modcompile.export.precision_subject import PrecisionSubject
from modcompile.export.subject import Subject
from modcompile.export.verification_inputs import Case, verification_cases
from modcompile.layerwise import LayerwiseQuantizeForCausalLM
from modcompile.modeling import RoutedForCausalLM
from modcompile.precision_folder import holds_precisions

Texts = Sequence[Sequence[int]]

_MAX_POSITIONS = 32768  # of a model that sets itself no limit


@dataclass(frozen=True)
class Exportable:
    """A loaded folder."""

    config: PretrainedConfig
    graph: Callable[[], fx.GraphModule]
    """What is lowered to ONNX."""
    verification: Callable[[Texts], tuple[Subject, list[Case]]]
    """From 8 rows of token ids to what `verify_model` takes."""

    @property
    def max_positions(self) -> int:
        """How many tokens a sequence may have."""
        return int(getattr(self.config, "max_position_embeddings", _MAX_POSITIONS))


def load_exportable(source: Path, config: ExportConfig) -> Exportable:
    """Read a routed or quantized folder to export it.

    Raises:
        ArtifactError, CheckpointError: it can't be read.
        ConfigError: the threshold is negative, infinite or not a number.
    """
    if holds_precisions(source):
        return _of_precisions(LayerwiseQuantizeForCausalLM.from_quantized(source), config.hard_threshold)
    return of_depth(load_with_routers(source), config)


def of_depth(model: RoutedForCausalLM, config: ExportConfig) -> Exportable:
    """The same of a model in float32 that is at hand; it is set to decide hard.

    Raises:
        ConfigError: the threshold is negative, infinite or not a number.
    """
    model.set_router_mode(config.hard_threshold)
    thresholds = model.hard_thresholds
    assert thresholds is not None
    return Exportable(
        model.config,
        model.hard_graph,
        lambda texts: (DepthSubject(model), verification_cases(model, texts, thresholds)),
    )


def _of_precisions(model: LayerwiseQuantizeForCausalLM, hard_threshold: float) -> Exportable:
    if model.depth_routers:
        model.set_hard_threshold(hard_threshold)

    def verification(texts: Texts) -> tuple[Subject, list[Case]]:
        return PrecisionSubject(model, texts, hard_threshold), precision_cases(model, texts, hard_threshold)

    return Exportable(model.config, model.export_graph, verification)
