"""Folders that can be exported, whichever routers they hold."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import fx
from transformers import PretrainedConfig

from modcompile.artifacts import load_with_routers
from modcompile.errors import ConfigError
from modcompile.export.depth_subject import DepthSubject
from modcompile.export.export_config import ExportConfig
from modcompile.export.folding import UNFOLDED, Folding
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
    routed: RoutedForCausalLM | None = None
    """What has gates that can be folded, hard."""

    @property
    def max_positions(self) -> int:
        """How many tokens a sequence may have."""
        return int(getattr(self.config, "max_position_embeddings", _MAX_POSITIONS))


def load_exportable(source: Path, config: ExportConfig) -> Exportable:
    """Read a routed or quantized folder to export it.

    Raises:
        ArtifactError, CheckpointError: it can't be read.
        ConfigError: the threshold is negative, infinite or not a number, or layers of a quantized folder are to be
            folded.
    """
    if holds_precisions(source):
        if config.always_active is not None or config.always_skipped is not None:
            raise ConfigError(
                f"--always_active and --always_skipped fold the gates of routed folders, and {source} is quantized; "
                "leave them out"
            )
        return _of_precisions(LayerwiseQuantizeForCausalLM.from_quantized(source), config.hard_threshold)
    return of_gates(load_with_routers(source, config.hard_threshold), UNFOLDED)


def of_gates(model: RoutedForCausalLM, folding: Folding) -> Exportable:
    """A hard model, to be exported at its thresholds and with some of its gates folded."""
    thresholds = model.hard_thresholds
    assert thresholds is not None
    return Exportable(
        model.config,
        lambda: folding.graph(model),
        lambda texts: (DepthSubject(model, folding), verification_cases(model, texts, thresholds, folding)),
        model,
    )


def _of_precisions(model: LayerwiseQuantizeForCausalLM, hard_threshold: float) -> Exportable:
    if model.depth_routers:
        model.set_hard_threshold(hard_threshold)

    def verification(texts: Texts) -> tuple[Subject, list[Case]]:
        return PrecisionSubject(model, texts, hard_threshold), precision_cases(model, texts, hard_threshold)

    return Exportable(model.config, model.export_graph, verification)
