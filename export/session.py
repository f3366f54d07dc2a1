"""Run an exported folder in ONNX Runtime."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort

from modcompile.errors import ArtifactError

MODEL_FILE = "model.onnx"
THRESHOLD_INPUT = "routing_threshold"

_PAST, _PRESENT = "past_key_values.", "present."

Cache = list[ort.OrtValue]


class RoutedSession:
    """An ONNX Runtime session on a `model.onnx` of ours, and the shapes of its cache.

    `thresholds` (one for each routed layer) override those of the artifact; None leaves them as they are. Without
    `providers`, CUDA is used where this onnxruntime has it, else the CPU.

    Raises:
        ArtifactError: the file is missing, or ONNX Runtime can't load it.
    """

    def __init__(
        self,
        model_file: Path,
        *,
        thresholds: Sequence[float] | None = None,
        num_threads: int | None = None,
        providers: Sequence[str] | None = None,
    ) -> None:
        if not model_file.is_file():
            raise ArtifactError(f"{model_file} does not exist; make it with python -m modcompile.export DIR")
        options = ort.SessionOptions()
        options.log_severity_level = 3  # else a line of warning for the optional input, at every load
        if num_threads is not None:
            options.intra_op_num_threads = num_threads
        try:
            self._session = ort.InferenceSession(str(model_file), options, providers=list(providers or _providers()))
        except Exception as error:
            raise ArtifactError(f"ONNX Runtime can't load {model_file}: {error}") from error
        inputs = {value.name: value for value in self._session.get_inputs()}
        optional = {value.name: value for value in self._session.get_overridable_initializers()}
        self._cache_shapes = {name: value.shape for name, value in inputs.items() if name.startswith(_PAST)}
        names = [value.name for value in self._session.get_outputs()]
        self._present = [name.replace(_PAST, _PRESENT) for name in self._cache_shapes]
        self._routing = [name for name in names if name.startswith("routing.")]
        self.routed_layers = tuple(int(name.partition(".")[2]) for name in self._routing)
        self.num_thresholds = int((inputs | optional)[THRESHOLD_INPUT].shape[0]) if THRESHOLD_INPUT in inputs | optional else 0
        self.thresholds = thresholds

    def empty_cache(self, batch: int) -> Cache:
        """The keys and values of no token, for `batch` rows."""
        shapes = [(batch, shape[1], 0, shape[3]) for shape in self._cache_shapes.values()]
        return [ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32)) for shape in shapes]

    def run(
        self, input_ids: np.ndarray, attention_mask: np.ndarray, position_ids: np.ndarray, cache: Cache
    ) -> tuple[np.ndarray, Cache, list[np.ndarray]]:
        """Logits `[B, T, V]`, the longer cache, and the routing masks `[B, T]` if the artifact tells them.

        `input_ids` and `position_ids` are `[B, T]`, `attention_mask` is `[B, P + T]` for a cache of P tokens.
        """
        feeds = dict(zip(self._cache_shapes, cache, strict=True))
        arrays = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        for name, array in arrays.items():
            feeds[name] = ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array, np.int64))
        if self.thresholds is not None and self.num_thresholds:
            feeds[THRESHOLD_INPUT] = ort.OrtValue.ortvalue_from_numpy(np.asarray(self.thresholds, np.float32))
        names = ["logits", *self._present, *self._routing]
        logits, *rest = self._session.run_with_ort_values(names, feeds)
        present, routing = rest[: len(self._present)], rest[len(self._present) :]
        return logits.numpy(), present, [mask.numpy() for mask in routing]


def _providers() -> list[str]:
    wanted = ("CUDAExecutionProvider", "CPUExecutionProvider")
    return [name for name in wanted if name in ort.get_available_providers()]
