"""Run an exported folder in ONNX Runtime."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort

from modcompile.export.folded_layers import ALWAYS_ACTIVE, ALWAYS_SKIPPED, told_layers
from modcompile.export.layer_work import told_work
from modcompile.export.loaded_model import ATTENTION_MASK, INPUT_IDS, POSITION_IDS, LoadedModel
from modcompile.export.overrides import Overrides
from modcompile.export.step_binding import Array, Cache, StepBinding
from modcompile.layer_ranges import layers_of

MODEL_FILE = "model.onnx"

ROUTING, PRECISION = "routing.", "precision."


class RoutedSession(Overrides):
    """An ONNX Runtime session on a `model.onnx` of ours.

    `gated_layers` are the layers of each routing mask that the artifact tells, `precision_layers` those whose bits it
    tells: none if it was exported without --emit_routing. `always_active` and `always_skipped` are layers whose gates
    were folded: there is neither a mask nor a threshold of them. `work` is what layers count in an active ratio, empty
    where they count alike. Without `providers`, CUDA is used where this
    onnxruntime has it, else the CPU; without `num_threads`, ONNX Runtime takes a thread for every core.

    Raises:
        ArtifactError: the file is missing, ONNX Runtime can't load it, or it is not one of ours.
        ConfigError: see `thresholds`.
    """

    def __init__(
        self,
        model_file: Path,
        *,
        thresholds: float | Sequence[float] | None = None,
        num_threads: int | None = None,
        providers: Sequence[str] | None = None,
    ) -> None:
        self.model = LoadedModel(model_file, num_threads=num_threads, providers=providers)
        super().__init__(self.model.optional)
        self.gated_layers, precise_layers = (
            tuple(layers_of(name.removeprefix(prefix)) for name in self.model.told if name.startswith(prefix))
            for prefix in (ROUTING, PRECISION)
        )
        self.precision_layers = tuple(layers.start for layers in precise_layers)
        self.always_active, self.always_skipped = (
            told_layers(self.model.metadata, key) for key in (ALWAYS_ACTIVE, ALWAYS_SKIPPED)
        )
        self.work = told_work(self.model.metadata)
        self.thresholds = thresholds

    def empty_cache(self, batch: int, capacity: int = 0) -> Cache:
        """The keys and values of no token, for `batch` rows, with room for `capacity` tokens."""
        return [
            ort.OrtValue.ortvalue_from_shape_and_type(
                (batch, shape[1], capacity, shape[3]), np.float32, self.model.device
            )
            for shape in self.model.pasts.values()
        ]

    def run(
        self, input_ids: Array, attention_mask: Array, position_ids: Array, cache: Cache
    ) -> tuple[Array, Cache, dict[str, Array]]:
        """Logits `[B, T, V]`, the longer cache, and what else the artifact tells, by name: masks or bits `[B, T]`.

        `input_ids` and `position_ids` are `[B, T]`, `attention_mask` is `[B, P + T]` for a cache of P tokens. The
        positions are fed to artifacts that take them; others derive them from the mask.

        Raises:
            ArtifactError: ONNX Runtime stops in the middle of the model.
        """
        feeds = {INPUT_IDS: input_ids, ATTENTION_MASK: attention_mask}
        if self.model.takes_positions:
            feeds[POSITION_IDS] = position_ids
        binding = StepBinding(self.model, self.overriding, cache)
        logits, told = binding.run(feeds)
        return logits, binding.present, told
