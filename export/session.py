"""Run an exported folder in ONNX Runtime."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from modcompile.config import check_threshold
from modcompile.errors import ArtifactError, ConfigError
from modcompile.layer_ranges import layers_of

MODEL_FILE = "model.onnx"
THRESHOLD_INPUT, BIAS_INPUT = "routing_threshold", "precision_bias"

ROUTING, PRECISION = "routing.", "precision."
_PAST, _PRESENT = "past_key_values.", "present."
_REQUIRED_INPUTS = ("input_ids", "attention_mask")
_TOKEN_INPUTS = (*_REQUIRED_INPUTS, "position_ids")

Array = NDArray[Any]
Cache = list[ort.OrtValue]
"""Keys and values `[B, heads, P, D]` of every layer by turns, where the session computes: on a GPU they stay there."""


class RoutedSession:
    """An ONNX Runtime session on a `model.onnx` of ours.

    `gated_layers` are the layers of each routing mask that the artifact tells, `precision_layers` those whose bits it
    tells: none if it was exported without --emit_routing. `num_thresholds` is the number of depth gates, `bias_shape`
    the number of layers that choose a precision, and of precisions. Without `providers`, CUDA is used where this
    onnxruntime has it, else the CPU.

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
        if not model_file.is_file():
            raise ArtifactError(f"{model_file} does not exist; make it with python -m modcompile.export DIR")
        self._model_file = model_file
        options = ort.SessionOptions()
        options.log_severity_level = 3  # else a line of warning for the optional input, at every load
        # A plan of memory is good for one shape, and with a growing cache every step has another: in every branch of
        # every layer a plan would be looked up, made and stored.
        options.enable_mem_pattern = False
        if num_threads is not None:
            options.intra_op_num_threads = num_threads
        try:
            self._session = ort.InferenceSession(str(model_file), options, providers=list(providers or _providers()))
        except Exception as error:
            raise ArtifactError(f"ONNX Runtime can't load {model_file}: {error}") from error
        inputs = {value.name: value for value in self._session.get_inputs()}
        optional = {value.name: value for value in self._session.get_overridable_initializers()}
        outputs = [value.name for value in self._session.get_outputs()]
        self._pasts = {name: value.shape for name, value in inputs.items() if name.startswith(_PAST)}
        self._presents = [name.replace(_PAST, _PRESENT) for name in self._pasts]
        self._token_inputs = [name for name in _TOKEN_INPUTS if name in inputs]
        for name in {*_REQUIRED_INPUTS, "logits", *self._presents} - {*inputs, *outputs}:
            raise ArtifactError(f"{model_file} has no {name}: it was not made by python -m modcompile.export")
        self._told = [name for name in outputs if name not in ("logits", *self._presents)]
        self._device = "cuda" if "CUDAExecutionProvider" in self._session.get_providers() else "cpu"
        self.gated_layers, precise_layers = (
            tuple(layers_of(name.removeprefix(prefix)) for name in self._told if name.startswith(prefix))
            for prefix in (ROUTING, PRECISION)
        )
        self.precision_layers = tuple(layers.start for layers in precise_layers)
        self.num_thresholds = int(optional[THRESHOLD_INPUT].shape[0]) if THRESHOLD_INPUT in optional else 0
        self.bias_shape = tuple(map(int, optional[BIAS_INPUT].shape)) if BIAS_INPUT in optional else (0, 0)
        self.thresholds = thresholds
        self._bias: Array | None = None

    @property
    def thresholds(self) -> tuple[float, ...] | None:
        """What overrides the thresholds of the artifact, one a gate; None leaves them as they are.

        One number may be assigned for all gates.

        Raises:
            ConfigError: a threshold is negative, infinite or not a number, or there are not as many as gates.
        """
        return self._thresholds

    @thresholds.setter
    def thresholds(self, values: float | Sequence[float] | None) -> None:
        if values is None:
            self._thresholds = None
            return
        given = list(values) if isinstance(values, Sequence) else [values] * self.num_thresholds
        if len(given) != self.num_thresholds:
            raise ConfigError(f"{len(given)} thresholds for {self.num_thresholds} gates; give one, or one each")
        self._thresholds = tuple(map(check_threshold, given))

    def set_precision_bias(self, bias: Any) -> None:
        """What is added to the logits of the routers of precisions, `bias_shape` or broadcast to it; None: as stored.

        Raises:
            ConfigError: it has another shape, or holds NaN, or the artifact does not choose precisions.
        """
        if bias is None:
            self._bias = None
            return
        if not all(self.bias_shape):
            raise ConfigError("a precision bias for an artifact that does not choose precisions; leave it out")
        try:
            given = np.broadcast_to(np.asarray(bias, np.float32), self.bias_shape)
        except ValueError as error:
            raise ConfigError(f"a precision bias must be numbers of shape {self.bias_shape} ({error})") from error
        if np.isnan(given).any():
            raise ConfigError("a precision bias holds NaN; give numbers, or infinity to force a precision")
        self._bias = given

    def empty_cache(self, batch: int) -> Cache:
        """The keys and values of no token, for `batch` rows."""
        return [
            ort.OrtValue.ortvalue_from_shape_and_type((batch, shape[1], 0, shape[3]), np.float32, self._device)
            for shape in self._pasts.values()
        ]

    def run(
        self, input_ids: Array, attention_mask: Array, position_ids: Array, cache: Cache
    ) -> tuple[Array, Cache, dict[str, Array]]:
        """Logits `[B, T, V]`, the longer cache, and what else the artifact tells, by name: masks or bits `[B, T]`.

        `input_ids` and `position_ids` are `[B, T]`, `attention_mask` is `[B, P + T]` for a cache of P tokens.

        Raises:
            ArtifactError: ONNX Runtime stops in the middle of the model.
        """
        arrays = zip(_TOKEN_INPUTS, (input_ids, attention_mask, position_ids), strict=True)
        feeds = {name: _to_ort(array, np.int64) for name, array in arrays if name in self._token_inputs}
        feeds |= zip(self._pasts, cache, strict=True)
        if self._thresholds:
            feeds[THRESHOLD_INPUT] = _to_ort(self._thresholds, np.float32)
        if self._bias is not None:
            feeds[BIAS_INPUT] = _to_ort(self._bias, np.float32)
        binding = self._session.io_binding()
        for name, value in feeds.items():
            binding.bind_ortvalue_input(name, value)
        # Bound, since a plain run would bring the cache of a GPU to the CPU and back in every step.
        for name in self._presents:
            binding.bind_output(name, self._device)
        for name in ("logits", *self._told):
            binding.bind_output(name)
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:
            raise ArtifactError(f"ONNX Runtime can't run {self._model_file}: {error}") from error
        values = binding.get_outputs()
        present, (logits, *told) = values[: len(self._presents)], values[len(self._presents) :]
        return logits.numpy(), present, {name: value.numpy() for name, value in zip(self._told, told, strict=True)}


def _to_ort(values: Any, dtype: type[np.generic]) -> ort.OrtValue:
    return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(values, dtype))


def _providers() -> list[str]:
    wanted = ("CUDAExecutionProvider", "CPUExecutionProvider")
    return [name for name in wanted if name in ort.get_available_providers()]
