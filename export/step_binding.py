"""A step of a model whose inputs and outputs are bound, so that the next step binds only what is new."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from modcompile.export.loaded_model import INPUT_IDS, LOGITS, LOGITS_TO_KEEP, LoadedModel

Array = NDArray[Any]
Cache = list[ort.OrtValue]
"""Keys and values `[B, heads, P, D]` of every layer by turns, where the session computes: on a GPU they stay there."""


class StepBinding:
    """Steps that read the cache `past` and write `present`, which may be the same; not given, each step allocates it.

    `overriding` is fed to every step.
    """

    def __init__(
        self, model: LoadedModel, overriding: Mapping[str, Array], past: Cache, present: Cache | None = None
    ) -> None:
        self._model = model
        self._binding = model.session.io_binding()
        self._bound: dict[str, ort.OrtValue] = {}  # holds memory that ONNX Runtime only points to
        for name, value in zip(model.pasts, past, strict=True):
            self._binding.bind_ortvalue_input(name, value)
        for name, array in overriding.items():
            self._bind(name, array, np.float32)
        for index, name in enumerate(model.presents):
            if present is None:
                # Bound, since a plain run would bring the cache of a GPU to the CPU and back in every step.
                self._binding.bind_output(name, model.device)
            else:
                self._binding.bind_ortvalue_output(name, present[index])
        self._sizes: tuple[Any, ...] | None = None
        self._arrays: dict[str, Array] = {}

    @property
    def present(self) -> Cache:
        """The cache after the last step."""
        return list(self._binding.get_outputs()[: len(self._model.presents)])

    def run(self, feeds: Mapping[str, Array]) -> tuple[Array, dict[str, Array]]:
        """Logits `[B, T, V]`, and what else the artifact tells, by name: masks or bits `[B, T]`.

        `feeds` are tokens, mask and so on, int64, by the input's name: the same inputs in every step. The next step
        overwrites the arrays if it has as many tokens.

        Raises:
            ArtifactError: ONNX Runtime stops in the middle of the model.
        """
        for name, array in feeds.items():
            self._bind(name, array, np.int64)
        sizes = (feeds[INPUT_IDS].shape, *feeds.get(LOGITS_TO_KEEP, ()))
        if sizes == self._sizes:
            self._model.run(self._binding)
        else:
            self._sizes = None
            names = [LOGITS, *self._model.told]
            for name in names:
                self._binding.bind_output(name)
            self._model.run(self._binding)
            # What this step allocated, the next of its size writes to.
            values = dict(zip(names, self._binding.get_outputs()[len(self._model.presents) :], strict=True))
            for name, value in values.items():
                self._binding.bind_ortvalue_output(name, value)
            self._arrays = {name: value.numpy() for name, value in values.items()}
            self._sizes = sizes
        return self._arrays[LOGITS], {name: self._arrays[name] for name in self._model.told}

    def _bind(self, name: str, array: Array, dtype: type[np.generic]) -> None:
        self._bound[name] = ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array, dtype))
        self._binding.bind_ortvalue_input(name, self._bound[name])
